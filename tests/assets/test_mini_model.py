"""The embedded mini model is a real Llama 4 checkpoint, and it can see."""

import numpy as np
from sklearn import datasets

import maverick_jax as mj
from maverick_jax.assets import digits, mini_directory
from maverick_jax.training.mini.evaluate import accuracy

QUESTIONS = 512
STATED = 0.90  # in the README


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
