"""How much of which prompts is computed next, within the tokens that may be computed beside a decode step.

A call takes the row that leads, and with it rows whose next piece has the same padded length. Of two calls that follow each other one
is led by the oldest row; the other by the oldest of those that need one piece more, so that a short prompt waits for one piece of a
long one and not for all of it. So whoever is the oldest gets every second call at least, and everybody becomes the oldest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from maverick_jax.inference.request import Row

FIFTHS = 20  # of a budget: with Pace's share of 0.25 as long as a decode step
PLANS_SAVED = 8  # whose budgets add up to the largest piece beside a decode step


class Piece(NamedTuple):
    """What a row computes next: `length` tokens in a program for `size`; `last` if it is up to date then."""

    row: Row
    length: int
    size: int
    last: bool

    @property
    def first(self) -> bool:
        return self.row.computed == 0


class Credit:
    """Padded tokens that may be computed beside decode steps; what is not used is saved, up to a bound."""

    def __init__(self, smallest: int):
        self._smallest = smallest
        self.tokens = 0

    def add(self, tokens: int, wanted: int) -> None:
        """A step may compute so many more; the smallest piece is saved for in `PLANS_SAVED` of them at the latest.

        Args:
          wanted: what all rows need next, padded. No more is saved, or a prompt that comes after a while would be read in one go.
        """
        tokens = max(tokens, -(-self._smallest // PLANS_SAVED))
        self.tokens = min(self.tokens + tokens, self.largest(tokens), max(self._smallest, tokens, wanted))

    def largest(self, tokens: int) -> int:
        """Size of the largest piece that can be saved for."""
        return max(self._smallest, PLANS_SAVED * tokens)


def for_many(budget: int, behind: int, decoding: int) -> int:
    """A step's budget where several prompts are read, so that slots fill soon; a single one, however long, takes no more than the budget.

    Four fifths of a budget for each, up to a time as long as the decode step's; but those who outnumber the rows that decode get their
    share.
    """
    return budget * max(5, min(4 * behind, FIFTHS), FIFTHS * (behind - 1) // decoding) // 5


def fit(n: int, sizes: Sequence[int]) -> tuple[int, int]:
    """How many of n are taken now, and the size that they are padded to: the smallest that holds all if they fill at least half of it.

    Args:
      sizes: ascending.
    """
    at = next((i for i, size in enumerate(sizes) if size >= n), len(sizes))
    if at < len(sizes) and (at == 0 or 2 * n >= sizes[at]):
        return n, sizes[at]
    return sizes[at - 1], sizes[at - 1]


def next_piece(row: Row, chunk: int | None, sizes: Sequence[int]) -> Piece:
    """The next piece of a row, which ends at the chunk's border at the latest."""
    left = row.total - row.computed
    length, size = fit(left if chunk is None else min(left, chunk - row.computed % chunk), sizes)
    return Piece(row, length, size, length == left)


def in_turn(pieces: Sequence[Piece], *, oldest: bool) -> list[Piece]:
    """Who leads the next call, the first choice first: the oldest row, or else the oldest that needs one piece more.

    Args:
      pieces: by age of the row, the oldest first.
    """
    return list(pieces) if oldest else sorted(pieces, key=lambda piece: not piece.last)


def alike(leader: Piece, pieces: Sequence[Piece]) -> list[Piece]:
    """The leader, and those that can share a call with it."""
    return [leader] + [p for p in pieces if p.size == leader.size and p.first == leader.first and p.row is not leader.row]
