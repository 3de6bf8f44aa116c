"""Drafts: tokens that probably come next, which one step of the model confirms or not.

A step draws a token at each place of the draft, and one behind it, each as if the draft before it were right; what was drawn counts
up to the first place where it is another token than the draft's. Every place draws with the random numbers of its own, so that an
answer has the same tokens with any drafts as with none, greedy or sampled.
Always: the index of a `PromptLookup` holds every n-gram of its tokens behind which a token stands, with its newest place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import Range, listed, shown, whole, whole_numbers

DRAFT = Range(whole, 1, 64, "a whole number between 1 and 64")
LONGEST = 8  # tokens of an n-gram
WINDOW = 1 << 15  # tokens of a prompt that are looked at, the last ones


class Drafts(Protocol):
    """What proposes, for one answer: a lookup in its own text, or a smaller model."""

    def extend(self, tokens: Sequence[int]) -> None:
        """The answer has grown by these."""
        ...

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; [] where nothing is worth trying. `most` is what is left to the chunk's border and to
        the answer's longest length, and may be 0."""
        ...


class PromptLookup:
    """Proposes what came after the newest earlier place of the last tokens: good where an answer repeats its prompt or itself.

    Takes the same time for each token, however many there are.

    Args:
      tokens: the prompt.
      n_grams: how many last tokens are looked for, the first length that is found counts.
      draft: tokens of a draft.

    Raises:
      UserError: lengths that are no whole numbers from 1 to 8, or a draft that is not one from 1 to 64.
    """

    def __init__(self, tokens: Sequence[int] = (), *, n_grams: Sequence[int] = (3, 2), draft: int = 4):
        self.draft = DRAFT.check("draft", draft)
        self.n_grams = _lengths(n_grams)
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # n-gram -> place of the token behind it
        self.extend(tokens[-WINDOW:])

    def extend(self, tokens: Sequence[int]) -> None:
        known = self._tokens
        for token in tokens:
            for n in self.n_grams:
                if len(known) >= n:
                    self._behind[tuple(known[-n:])] = len(known)
            known.append(token)

    def propose(self, most: int) -> list[int]:
        """Where the earlier text ends, what is proposed goes on: of a text that repeats itself the draft does too."""
        known = self._tokens
        place = next((at for n in self.n_grams if (at := self._behind.get(tuple(known[-n:])))), None)
        drafted: list[int] = []
        if place is not None:
            for at in range(place, place + min(most, self.draft)):
                drafted.append(known[at] if at < len(known) else drafted[at - len(known)])
        return drafted


@dataclasses.dataclass
class Acceptance:
    """What drafts were good for. `steps` are those with a draft."""

    steps: int = 0
    proposed: int = 0
    accepted: int = 0

    def count(self, proposed: int, accepted: int) -> None:
        self.steps += 1
        self.proposed += proposed
        self.accepted += accepted

    @property
    def rate(self) -> float:
        """Tokens accepted of those proposed; 0 without any."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Of a step with a draft; 1 without any, as a step without a draft gives."""
        return 1 + self.accepted / self.steps if self.steps else 1.0


def _lengths(n_grams: Sequence[int]) -> tuple[int, ...]:
    items = listed(n_grams)
    lengths = whole_numbers(items, "n_grams") if items else []
    if not lengths or min(lengths) < 1 or max(lengths) > LONGEST:
        raise UserError(f"n_grams is {shown(n_grams)}: expected whole numbers between 1 and {LONGEST}, the first to try first.")
    return tuple(lengths)
