"""A model that says what it is told to, at once and without being compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

import maverick_jax as mj
from maverick_jax.assets import mini_directory
from maverick_jax.prompt import Tokenizer
from maverick_jax.training.mini.definition import mini_config, mini_tokenizer

TOKENIZER = Tokenizer(mini_tokenizer())
CONFIG = mini_config(mini_tokenizer())

Answer = str | Iterable[str | BaseException] | Callable[[str], str]


class Model(mj.Llama4):
    """The mini model's tokenizer and config, and no weights."""

    config = CONFIG
    directory = str(mini_directory())

    def __init__(self):
        pass


class Scripted:
    """Stands for `Generation`: notes the prompts, and says the next answer a few tokens at a time.

    Attributes:
      answers: what will be said: a text, or its parts and what breaks it off, or a function of the prompt's text.
      seen: token ids and tiles of every prompt.
    """

    answers: list[Answer]
    seen: list[tuple[list[int], np.ndarray | None]]
    seconds = {"compile": 0.0, "prefill": 1.0, "decode": 1.0}  # noqa: RUF012 - never changed
    prompt_tokens = new_tokens = dropped = 0
    decode_rate = 0.0

    def __init__(self, model, prompts, *, tiles, max_new_tokens, sampling):
        (self.prompt,) = prompts
        self.seen.append((self.prompt, tiles))
        self.settings = (max_new_tokens, sampling)

    def __iter__(self) -> Iterator[list[list[int]]]:
        answer = self.answers.pop(0)
        if callable(answer):
            answer = answer(TOKENIZER.decode(self.prompt))
        for part in [answer] if isinstance(answer, str) else answer:
            if isinstance(part, BaseException):
                raise part
            ids = TOKENIZER.encode(part)
            for start in range(0, len(ids), 3):
                yield [ids[start : start + 3]]
