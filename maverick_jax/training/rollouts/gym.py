"""Prompts that reasoning-gym makes and scores, `reasoning-gym:NAME?size=500&seed=1`, for text.

https://github.com/open-thought/reasoning-gym, Apache License 2.0; the extra `gym` installs it.
"""

from __future__ import annotations

import importlib
import urllib.parse
from typing import Any

from maverick_jax.errors import UserError, first_line
from maverick_jax.training.data.conversations import Conversation
from maverick_jax.training.data.examples import Reading
from maverick_jax.training.rollouts.prompts import Prompt, prompt_of
from maverick_jax.training.rollouts.rewards import Reward

SCHEME = "reasoning-gym:"
SIZE = 500


def gym_prompts(address: str, reading: Reading, *, length: int) -> tuple[list[Prompt], Reward]:
    """The prompts of at most `length` tokens, and what their generator says of answers: from 0 to 1.

    Args:
      address: `SCHEME`, a generator's name, and its settings as in a URL: `size`, `seed`, and its own.

    Raises:
      UserError: reasoning-gym is not installed, there is no such generator, or it takes no such setting.
    """
    try:
        gym: Any = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise UserError(f"{address} needs reasoning-gym: pip install '.[gym]'.") from error
    name, _, query = address.removeprefix(SCHEME).partition("?")
    settings: dict[str, Any] = {key: _value(text) for key, text in urllib.parse.parse_qsl(query)}
    try:
        entries = gym.create_dataset(name, **{"size": SIZE, "seed": 0, **settings})
    except Exception as error:
        raise UserError(f"{address} is nothing that reasoning-gym makes ({type(error).__name__}: {first_line(error)}).") from error
    prompts = []
    for number, entry in enumerate(entries):
        messages = [{"role": "user", "content": entry["question"]}]
        line = Conversation(number, messages, None, {"answer": str(entry["answer"]), "entry": entry})
        prompts.append(prompt_of(line, reading, name))
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= length]
    if not fitting:
        raise UserError(f"{address} has no prompt of at most {length:,} tokens: raise --length.")
    return fitting, lambda text, line: entries.score_answer(text.strip(), line["entry"])


def _value(text: str) -> Any:
    """A number where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
