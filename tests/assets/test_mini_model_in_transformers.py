"""transformers loads the mini model, its tokenizer and its template, and says the same."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Llama4ForConditionalGeneration

import maverick_jax as mj
from maverick_jax.assets import mini_directory
from maverick_jax.prompt import render
from maverick_jax.training.mini.evaluate import answers

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def theirs() -> Llama4ForConditionalGeneration:
    return Llama4ForConditionalGeneration.from_pretrained(mini_directory(), dtype=torch.float32, attn_implementation="eager").eval()


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
