"""A model that says what it is told to, at once and without being compiled."""

from __future__ import annotations

import types
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
    """Stands for `engine_for` and the engine and the handle that come of it: notes the prompts, and says the next answer.

    Attributes:
      answers: what will be said: a text, or its parts and what breaks it off, or a function of the prompt's text.
      seen: token ids and tiles of every prompt.
    """

    answers: list[Answer]
    seen: list[tuple[list[int], np.ndarray | None]]
    seconds = {"compile": 0.0, "prefill": 1.0, "decode": 1.0}  # noqa: RUF012 - never changed
    prompt_tokens = new_tokens = cached_tokens = 0
    decode_rate = 0.0

    def __init__(self, model, lengths):
        self.limits = types.SimpleNamespace(max_length=lengths[0])

    def submit(self, request) -> Scripted:
        self.request = request
        self.seen.append((request.ids, request.tiles))
        return self

    def cancel(self) -> None:
        pass

    def __iter__(self) -> Iterator[int]:
        answer = self.answers.pop(0)
        if callable(answer):
            answer = answer(TOKENIZER.decode(self.request.ids))
        for part in [answer] if isinstance(answer, str) else answer:
            if isinstance(part, BaseException):
                raise part
            yield from TOKENIZER.encode(part)
