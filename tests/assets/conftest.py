"""The mini model's tokenizer, and questions about pictures that it has not seen."""

import pytest

import maverick_jax as mj
from maverick_jax.assets import digits, mini_directory
from maverick_jax.prompt import Tokenizer, render


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
