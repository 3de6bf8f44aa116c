"""What a step of the engine does, as plain data: copies, new entries of the page tables, calls of the programs; and its limits.

Everything happens in the order in which it stands here, one copy after the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What there is, and what the compiled programs take.

    Attributes:
      slots: rows that can run at once.
      pages: of the layers that see everything.
      page: tokens of a page.
      chunk: tokens that the other layers see, a multiple of `page`; None for a model without such layers.
      max_length: longest prompt and answer together.
      queue: requests that may wait.
      decode_rows, prefill_rows, piece_sizes: rows of a call of either kind, and tokens of a row in a prefill, that there are programs
        for; ascending, the first of the rows 1.
      piece_tokens: most tokens of a prefill call, rows times length.
      draft: longest draft, in tokens; there are decode programs for one token and for one and a draft. 0 without.
      reuse: whether a row may begin with what others have computed.
    """

    slots: int
    pages: int
    page: int
    chunk: int | None
    max_length: int
    queue: int
    decode_rows: tuple[int, ...]
    prefill_rows: tuple[int, ...]
    piece_sizes: tuple[int, ...]
    piece_tokens: int = 8192
    draft: int = 0
    reuse: bool = True


@dataclass(frozen=True)
class Copy:
    """Makes what the cache holds for one slot hold for another.

    Attributes:
      source, target: slots whose chunk buffers are copied; None if they are not.
      tokens: how many of the buffers' tokens count, from their first on.
      pages: pairs of pages of the layers that see everything, from and to.
    """

    source: int | None
    target: int | None
    tokens: int
    pages: tuple[tuple[int, int], ...]


class Part(NamedTuple):
    """One row's share of a call.

    Attributes:
      row: its number.
      slot: where it runs.
      start: place of the first token that is computed.
      length: tokens that are computed; in "decode" the last token drawn, and a draft behind it.
      samples: with the last of them a token is drawn.
      step: tokens that the row has drawn before.
    """

    row: int
    slot: int
    start: int
    length: int
    samples: bool
    step: int


@dataclass(frozen=True)
class Call:
    """One run of a program.

    Attributes:
      kind: in "decode" every part begins with the token that its slot drew last.
      rows: number of rows that the program has, at least that of the parts.
      tokens: length that each row has in the program, at least that of every part; 1 in "decode" without drafts.
      first: all parts begin at 0: there is nothing before them.
    """

    kind: Literal["prefill", "decode"]
    parts: tuple[Part, ...]
    rows: int
    tokens: int
    first: bool


@dataclass(frozen=True)
class Plan:
    """One step.

    Attributes:
      copies: before everything else.
      table_changes: (slot, column, page): the page of a slot's stretch of tokens, from now on.
      calls: decode before prefill.
      finished: numbers of rows that were cancelled or whose deadline passed since the last plan.
      preempted: numbers of rows that gave their slot and pages to older ones, and will be computed again.
    """

    copies: tuple[Copy, ...] = ()
    table_changes: tuple[tuple[int, int, int], ...] = ()
    calls: tuple[Call, ...] = ()
    finished: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()

    def as_json(self) -> str:
        """One line."""
        return json.dumps(vars(self), default=vars, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> Plan:
        """The plan of which `as_json` made this."""
        values = json.loads(line)
        return cls(
            copies=tuple(Copy(**copy | {"pages": tuple(map(tuple, copy["pages"]))}) for copy in values["copies"]),
            table_changes=tuple(map(tuple, values["table_changes"])),
            calls=tuple(Call(**call | {"parts": tuple(Part(*part) for part in call["parts"])}) for call in values["calls"]),
            finished=tuple(values["finished"]),
            preempted=tuple(values["preempted"]),
        )


def shapes(limits: Limits) -> list[Call]:
    """Every call that there can be, without rows: what is to be compiled."""
    found = []
    for tokens in limits.piece_sizes:
        for rows in limits.prefill_rows:
            if rows * tokens <= limits.piece_tokens or rows == limits.prefill_rows[0]:
                found += [Call("prefill", (), rows, tokens, first) for first in (True, False)]
    drafts = (0, limits.draft) if limits.draft else (0,)
    return [*found, *(Call("decode", (), rows, 1 + draft, False) for rows in limits.decode_rows for draft in drafts)]
