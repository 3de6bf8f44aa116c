"""How to choose tokens: the settings that a caller gives, checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import Range, listed, real, shown, whole

FLOAT32_MAX = float(np.finfo(np.float32).max)
MOST_BIASES = 300  # as in OpenAI's interface
MOST_LOGPROBS = 20
RANGES = {
    "temperature": Range(real, 0.0, FLOAT32_MAX, "a finite number, 0 (greedy) or more"),
    "top_k": Range(whole, 1, float("inf"), "a whole number, 1 or more"),
    "top_p": Range(real, np.nextafter(0.0, 1.0), 1.0, "a number above 0 and at most 1"),
    "min_p": Range(real, 0.0, 1.0, "a number between 0 and 1"),
    "repetition_penalty": Range(real, 0.01, 100.0, "a number between 0.01 and 100, 1 for none"),
    "presence_penalty": Range(real, -2.0, 2.0, "a number between -2 and 2, 0 for none"),
    "frequency_penalty": Range(real, -2.0, 2.0, "a number between -2 and 2, 0 for none"),
    "min_tokens": Range(whole, 0, float("inf"), "a whole number, 0 or more"),
    "logprobs": Range(whole, 0, MOST_LOGPROBS, f"a whole number between 0 and {MOST_LOGPROBS}"),
}
MAY_BE_NONE = ("top_k", "top_p", "min_p", "logprobs")
BIAS = Range(real, -100.0, 100.0, "a number between -100 and 100")
SEED = Range(whole, 0, 2**32 - 1, "a whole number between 0 and 2^32 - 1, or a list of them, one per prompt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens. A chat's is `chat.sampling`, which may be replaced between two questions; `generate` takes the same
    settings by their names.

    In this order: `logit_bias`, the penalties, what may not be drawn, `temperature`, `top_k`, `top_p`, `min_p`.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: keep the k most likely tokens (None: all). Of equally likely ones the lower ids come first.
      top_p: then keep the most likely ones that together reach this probability (None: all).
      min_p: then keep those at least this fraction as likely as the most likely one (None: all).
      seed: one per row, or one number s for all: then row i has seed s + i (modulo 2^32). What a row draws follows from its
        own seed, wherever it stands and whatever stands beside it.
      repetition_penalty: above 1 makes what stands in the prompt or the answer less likely: a positive logit is divided by
        it, a negative one multiplied.
      presence_penalty: taken off the logit of every token that the answer has.
      frequency_penalty: taken off the logit of a token for each time that the answer has it.
      logit_bias: what is added to the logits of tokens, by their ids; -100 as good as forbids one.
      min_tokens: before so many tokens no stop token is drawn.
      logprobs: with every token its log-probability and those of the n most likely ones: natural logarithms of what the model
        says, before all of the settings above (None: none).

    Raises:
      UserError: a value of another type or outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | Sequence[int] = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    min_tokens: int = 0
    logprobs: int | None = None

    def __post_init__(self):
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value is not None or name not in MAY_BE_NONE:
                object.__setattr__(self, name, allowed.check(name, value))
        seeds = None if whole(self.seed) is not None else listed(self.seed)
        read = SEED.check("seed", self.seed) if seeds is None else tuple(SEED.check(f"seed {i}", s) for i, s in enumerate(seeds))
        object.__setattr__(self, "seed", read)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    def by_row(self, batch: int) -> list[Sampling]:
        """The same settings for every row, each with its own seed."""
        return [dataclasses.replace(self, seed=int(seed)) for seed in self.seeds(batch)]

    def seeds(self, batch: int) -> np.ndarray:
        """[B] uint32."""
        if isinstance(self.seed, int):
            return (np.uint64(self.seed) + np.arange(batch, dtype=np.uint64)).astype(np.uint32)
        if len(self.seed) != batch:
            raise UserError(f"seed has {len(self.seed)} numbers for {batch} prompts: give one per prompt, or a single one.")
        return np.array(self.seed, np.uint32)

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raises `UserError` for a bias of a token that there is not."""
        for id in self.logit_bias or ():
            if id >= vocabulary:
                raise UserError(f"logit_bias has token id {id} outside 0..{vocabulary - 1}: is it from another tokenizer?")

    @functools.cached_property
    def has_extras(self) -> bool:
        """Does it ask for what `RowExtras` holds?"""
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "logprobs")
        return bool(self.logit_bias) or any(getattr(self, name) != getattr(Sampling, name) for name in names)


def _biases(given: Any) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise UserError(f"logit_bias is {shown(given)}: expected a dict from token ids to what is added to their logits.")
    if len(given) > MOST_BIASES:
        raise UserError(f"logit_bias has {len(given)} tokens: at most {MOST_BIASES} are taken.")
    biases = {}
    for id, value in given.items():
        number = whole(id)
        if number is None or number < 0:
            raise UserError(f"logit_bias has the key {shown(id)}: expected token ids, whole numbers from 0 on.")
        biases[number] = BIAS.check(f"logit_bias of token {number}", value)
    return biases
