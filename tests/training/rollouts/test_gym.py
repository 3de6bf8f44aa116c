"""Prompts of reasoning-gym: a stand-in for the library, and the library itself where it is installed."""

import sys
from types import SimpleNamespace

import pytest

from maverick_jax.assets import mini_directory
from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.training.data.files import reading_of
from maverick_jax.training.rollouts.gym import gym_prompts

READING = reading_of(mini_directory(), Config.from_directory(mini_directory()))


class Sums(list):
    """A generator's entries."""

    def score_answer(self, answer, entry):
        return 1.0 if answer == entry["answer"] else 0.25


def create_dataset(name, size, seed, most=9):
    if name != "sums":
        raise ValueError(f"no dataset {name}")
    return Sums({"question": f"{seed} + {n}?" + " " * (200 * (n == 2)), "answer": str(seed + n)} for n in range(size))


def test_prompts_and_scores(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    prompts, reward = gym_prompts("reasoning-gym:sums?size=4&seed=3", READING, length=64)
    assert [prompt.line["messages"][0]["content"] for prompt in prompts] == ["3 + 0?", "3 + 1?", "3 + 3?"]  # one is too long
    assert reward(" 4\n", prompts[1].line) == 1
    assert reward("5", prompts[1].line) == 0.25
    with pytest.raises(UserError, match=r"reasoning-gym:sum is nothing that reasoning-gym makes \(ValueError: no dataset sum\)"):
        gym_prompts("reasoning-gym:sum", READING, length=64)
    with pytest.raises(UserError, match=r"TypeError: .*'best'"):
        gym_prompts("reasoning-gym:sums?best=1", READING, length=64)
    with pytest.raises(UserError, match="has no prompt of at most 4 tokens: raise --length"):
        gym_prompts("reasoning-gym:sums", READING, length=4)


def test_it_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"needs reasoning-gym: pip install '\.\[gym\]'"):
        gym_prompts("reasoning-gym:sums", READING, length=64)


def test_the_library_itself():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install '.[gym]'")
    prompts, reward = gym_prompts("reasoning-gym:basic_arithmetic?size=5&seed=1", READING, length=512)
    assert len(prompts) == 5
    assert reward(prompts[0].line["answer"], prompts[0].line) == 1
    assert reward("no", prompts[0].line) < 1
