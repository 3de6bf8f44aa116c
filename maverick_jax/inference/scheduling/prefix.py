"""What of a prompt is in the cache already: full pages by their tokens, and the slots whose chunk buffers end where it goes on.

A row can begin at m tokens if the first m agree, the pages of the layers that see everything are there, and either m is a multiple of
the chunk (the other layers need nothing then) or some slot's buffers still hold m's chunk up to m. Tokens are compared, never their
hashes alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from maverick_jax.inference.request import Row
from maverick_jax.inference.scheduling.pages import Page, Pages

STRETCH = 256  # keys that are compared at once


@dataclass(eq=False, slots=True)
class Retained:
    """What a slot holds after its row has left, until somebody else writes there.

    Attributes:
      keys: of its tokens, at least `known`.
      pages: those that hold the known tokens.
      known: tokens in the cache of which it is known which they are.
      start: the first of them that the chunk buffers hold.
    """

    keys: list[int]
    pages: list[Page]
    known: int
    start: int

    def trim(self, page: int) -> None:
        """Forget what was evicted, which are the last pages, of `page` tokens each."""
        while self.pages and self.pages[-1].gone:
            self.pages.pop()
        self.known = min(self.known, len(self.pages) * page)


class Resume(NamedTuple):
    """Where a row can begin.

    Attributes:
      length: tokens that need not be computed.
      pages: full pages of these tokens.
      partial: the page that holds the rest of them; None if they end with a page.
      source: slot that was found to hold the last of them; None if the pages alone were found.
    """

    length: int
    pages: list[Page]
    partial: Page | None
    source: int | None


NOTHING = Resume(0, [], None, None)


class Prefix:
    """Finds where a row can begin.

    Args:
      pages: the pool, which also knows the pages by their keys.
      page: tokens of a page.
      chunk: tokens of a chunk, a multiple of `page`; None for a model without.
    """

    def __init__(self, pages: Pages, page: int, chunk: int | None):
        self._pages = pages
        self._page = page
        self._chunk = chunk

    def find(self, keys: list[int], slots: Iterable[tuple[int, Row | Retained]], reusable: int) -> Resume:
        """The longest resume point of a row with these tokens, of which that many may be reused: one at least is left to compute.

        Of a prompt like no other, this packs one page of keys and looks at one key of each slot.
        """
        most = min(len(keys) - 1, reusable)
        path = self._walk(keys)
        best, pages, source = min(len(path) * self._page, most), path, None
        if self._chunk is not None:
            best -= best % self._chunk
        for slot, holder in slots:
            if isinstance(holder, Retained):
                holder.trim(self._page)
            known = holder.known
            if known <= best or best == most or keys[best] != holder.keys[best]:
                continue
            stop = min(known, most)
            length = common(keys, holder.keys, min(self._same_pages(path, holder.pages) * self._page, stop), stop)
            if length > best and length > (holder.start if isinstance(holder, Retained) else self.chunk_start(holder)):
                best, pages, source = length, holder.pages, slot
        whole, rest = divmod(best, self._page)
        return Resume(best, pages[:whole], pages[whole] if rest else None, source)

    def chunk_start(self, row: Row) -> int:
        """First token that the chunk buffers of a row's slot hold: of the chunk that was written last, a step launched ahead included.

        A row that began at a border found nothing there.
        """
        return 0 if self._chunk is None else max(row.computed - 1, row.cached) // self._chunk * self._chunk

    def seal(self, row: Row) -> list[int]:
        """Let others find the pages that a row has filled.

        Where such a page is there already, the row takes it and gives its own back.

        Returns:
          the places in `row.pages` where another page stands now.
        """
        changed = []
        while (row.sealed + 1) * self._page <= row.known:
            place, own = row.sealed, row.pages[row.sealed]
            key = (row.pages[place - 1] if place else None, self._pack(row.keys, place))
            page = self._pages.find(key)
            if page is None:
                self._pages.seal(own, key)
            else:
                self._pages.hold(page)
                self._pages.release(own, keep=False)
                row.pages[place] = page
                changed.append(place)
            row.sealed += 1
        return changed

    def _walk(self, keys: list[int]) -> list[Page]:
        path: list[Page] = []
        for place in range(len(keys) // self._page):
            page = self._pages.find((path[-1] if path else None, self._pack(keys, place)))
            if page is None:
                break
            path.append(page)
        return path

    def _pack(self, keys: list[int], place: int) -> bytes:
        return array("q", keys[place * self._page : (place + 1) * self._page]).tobytes()

    @staticmethod
    def _same_pages(a: list[Page], b: list[Page]) -> int:
        """How many leading pages are the same: where one is, those before it are."""
        least, most = 0, min(len(a), len(b))
        while least < most:
            middle = (least + most + 1) // 2
            if a[middle - 1] is b[middle - 1]:
                least = middle
            else:
                most = middle - 1
        return least


def common(a: list[int], b: list[int], start: int, stop: int) -> int:
    """How many leading keys are the same, at most `stop`, where the first `start` are."""
    while start < stop:
        end = min(start + STRETCH, stop)
        if a[start:end] != b[start:end]:
            return next(i for i in range(start, end) if a[i] != b[i])
        start = end
    return start
