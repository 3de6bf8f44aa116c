"""The embedded mini model is a real Llama 4 checkpoint: transformers loads it and answers the same, and it can see."""

import numpy as np
import pytest
import torch
from sklearn import datasets
from transformers import AutoTokenizer, Llama4ForConditionalGeneration

import maverick_jax as mj
from maverick_jax.assets import digits, mini_directory
from maverick_jax.prompt import Tokenizer, render
from maverick_jax.training.mini.evaluate import accuracy, answers

TOLERANCE = 1e-4
QUESTIONS = 512
STATED = 0.90  # in the README


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(mini_directory())


@pytest.fixture(scope="module")
def examples() -> list:
    return digits.held_out_examples(8)


@pytest.fixture(scope="module")
def prompts(tokenizer, examples) -> list:
    config = mj.Config.from_directory(mini_directory())
    pictures = [digits.picture(pixels) for pixels in digits.held_out()[0]]
    return [render(digits.messages(question, pictures[left], pictures[right]), tokenizer, config) for question, left, right, _ in examples]


@pytest.fixture(scope="module")
def theirs() -> Llama4ForConditionalGeneration:
    return Llama4ForConditionalGeneration.from_pretrained(mini_directory(), dtype=torch.float32, attn_implementation="eager").eval()


def test_it_has_every_part_of_the_architecture():
    config = mj.Config.from_directory(mini_directory())
    text = config.text
    assert text.num_local_experts == 128
    assert 0 < len(text.moe_layers) < text.num_hidden_layers
    assert 0 < len(text.nope_layers) < text.num_hidden_layers
    assert text.attention_chunk_size < 40  # questions and answers cross a chunk border
    assert config.vision is not None


def test_accuracy_on_held_out_pictures(tokenizer):
    """The README states this figure."""
    right = accuracy(mj.load(), tokenizer, QUESTIONS)
    assert right["all"] >= STATED, right


def test_held_out_pictures_are_none_of_the_others():
    """scikit-learn's 1,797 pictures minus ours: no training picture is among ours."""
    everything = [picture.tobytes() for picture in (datasets.load_digits().images * (255 / 16)).round().astype(np.uint8)]
    ours = [picture.tobytes() for picture in digits.held_out()[0]]
    assert len(set(ours)) == len(ours) == 360
    assert all(everything.count(picture) == 1 for picture in ours)


def test_transformers_gives_the_same_logits(prompts, theirs):
    ours = mj.load(dtype="float32")
    for prompt in prompts[:2]:
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor([prompt.token_ids]), pixel_values=torch.from_numpy(prompt.tiles)).logits
        actual = ours(np.array([prompt.token_ids], np.int32), prompt.tiles)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def test_transformers_answers_the_same(prompts, theirs, tokenizer, examples):
    """The pictures are our tiles: transformers' own image processor needs torchvision."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids])
        with torch.no_grad():
            new = theirs.generate(ids, pixel_values=torch.from_numpy(prompt.tiles), max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        texts.append(tokenizer.decode(new.tolist()))
    assert texts == answers(mj.load(dtype="float32"), tokenizer, examples)


def test_transformers_reads_the_tokenizer_and_the_template(tokenizer):
    theirs = AutoTokenizer.from_pretrained(mini_directory())
    messages = [{"role": "user", "content": "What is the sum? 12 + 3, ééé"}, {"role": "assistant", "content": "15."}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == render(messages, tokenizer, mj.Config.from_directory(mini_directory())).token_ids
