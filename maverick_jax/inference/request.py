"""What is asked of the engine, and how far it has got with it."""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import Range, real, whole
from maverick_jax.inference.sampling import MOST_LOGPROBS, Sampling

if TYPE_CHECKING:
    from maverick_jax.inference.grammar import Grammar
    from maverick_jax.inference.scheduling.pages import Page

PROMPT_LOGPROBS = Range(whole, 0, MOST_LOGPROBS, f"a whole number between 0 and {MOST_LOGPROBS}")
DEADLINE = Range(real, 0.0, float(np.finfo(np.float32).max), "a number of seconds, 0 or more")


class Full(UserError):
    """As many requests wait as may wait."""


class Finish(enum.Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
      ids: tokens of the prompt, one or more.
      tiles: [N, 3, S, S] float32 of its pictures, in order; None without.
      max_new_tokens: longest answer, a stop token included.
      sampling: how tokens are chosen, with one seed.
      stop_ids: tokens that end the answer; None takes the model's, `()` never stops early.
      deadline: seconds after it was submitted; None for as long as it takes.
      grammar: the form that the answer shall have, if any.
      prompt_logprobs: with every token of the prompt but the first its log-probability and those of the n most likely ones, as
        `Sampling.logprobs` has it for new tokens (None: none). All of the prompt is computed then, whatever is in the cache.
      adapter: name of one that the engine has; None is the model alone.
      routed_experts_prompt_start: from this token of the prompt on it is told which experts the tokens went to (None: it is not). They are
        computed then, whatever is in the cache. For an engine that was made with `routed_experts=True`.
    """

    ids: Sequence[int] | np.ndarray
    tiles: np.ndarray | None = None
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Collection[int] | int | None = None
    deadline: float | None = None
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None
    adapter: str | None = None
    routed_experts_prompt_start: int | None = None

    @property
    def reusable(self) -> int:
        """How many tokens of the prompt need not be computed if they are in the cache."""
        if self.prompt_logprobs is not None:
            return 0
        return len(self.ids) if self.routed_experts_prompt_start is None else self.routed_experts_prompt_start


@dataclass(frozen=True, eq=False, kw_only=True)
class Admitted(Request):
    """A request that was checked: arrays for lists, and the model's stop tokens where it named none."""

    ids: np.ndarray
    stop_ids: frozenset[int] = frozenset()


@dataclass(eq=False, slots=True)
class Row:
    """A request that is being served; always `cached <= computed < total`, and `computed` is 0 where there is no slot.

    Attributes:
      number: order of arrival.
      keys: what stands at each place, of the prompt and of the new tokens that have been read: the token's id, or a number of
        its own for a part of a picture.
      prompt: tokens of the prompt.
      slot: None while it waits.
      pages: of the layers that see everything, in order.
      cached: tokens whose keys and values were there when it got its slot.
      computed: tokens whose keys and values have been launched into the cache, those that were there included.
      total: tokens of the prompt and tokens drawn, those launched and not yet read included.
      reusable: the first of them that may be taken from what others have computed.
      ahead: whether its steps are planned before the last one's token is read.
      draws: its newest token was drawn in the slot it holds, where the device finds it: the row decodes.
      sealed: leading pages that others find by their keys.
      followers: rows that wait until so many tokens are computed, which they share.
      expires: when it ends whatever it has; None without a deadline.
      finish: None until it has ended.
    """

    number: int
    request: Request
    keys: list[int]
    prompt: int
    reusable: int
    slot: int | None = None
    pages: list[Page] = field(default_factory=list)
    cached: int = 0
    computed: int = 0
    total: int = 0
    ahead: bool = True
    draws: bool = False
    sealed: int = 0
    followers: list[tuple[int, Row]] = field(default_factory=list)
    expires: float | None = None
    finish: Finish | None = None

    @property
    def new_tokens(self) -> list[int]:
        """Those that have been read."""
        return self.keys[self.prompt :]

    @property
    def behind(self) -> bool:
        """Something is to be computed before it can draw one token per step."""
        return not self.draws

    @property
    def unread(self) -> int:
        """Tokens drawn by a launched step and not yet read."""
        return self.total - len(self.keys)

    @property
    def known(self) -> int:
        """Tokens that are in the cache and of which it is known which they are."""
        return min(self.computed, len(self.keys))

    @property
    def complete(self) -> bool:
        """All its tokens are drawn; those that are unread still come."""
        return self.total == self.prompt + self.request.max_new_tokens
