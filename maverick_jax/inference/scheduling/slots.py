"""What rows hold of the cache: a slot each and pages; and what idle slots and pages keep of rows that have left.

Always: every slot is either running or idle, and a row without a slot has no pages. Table changes and copies are to be made in the order in
which they come: what a slot or page held before may be needed until then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from maverick_jax.inference.request import Row
from maverick_jax.inference.scheduling.pages import Page, Pages
from maverick_jax.inference.scheduling.plans import Copy, Limits
from maverick_jax.inference.scheduling.prefix import NOTHING, Prefix, Resume, Retained


class Slots:
    """All slots and pages of a cache.

    Attributes:
      running: rows, by their slots.
      idle: what each of the other slots still holds, if anything; the least recently used first.
      changes: of the page tables, (slot, column, page), since somebody took them from here.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.running: dict[int, Row] = {}
        self.idle: OrderedDict[int, Retained | None] = OrderedDict.fromkeys(range(limits.slots))
        self.changes: list[tuple[int, int, int]] = []
        self._pages = Pages(limits.pages)
        self._prefix = Prefix(self._pages, limits.page, limits.chunk)

    @property
    def available(self) -> int:
        """Pages that no row holds."""
        return self._pages.available

    def pages_of(self, tokens: int) -> int:
        """How many pages so many tokens need."""
        return -(-tokens // self.limits.page)

    def find(self, row: Row) -> Resume:
        """Where a row can begin now."""
        return self._prefix.find(row.keys, self._holders(), row.reusable) if self.limits.reuse else NOTHING

    def pages_needed(self, row: Row, resume: Resume) -> int:
        """Of the available ones, to hold all of the row's tokens."""
        return self.pages_of(row.total) - len(resume.pages) + sum(not page.holders for page in resume.pages)

    def enter(self, row: Row, resume: Resume) -> Copy | None:
        """Give a row an idle slot and the pages that `find` has just found; `pages_needed` of them are available.

        The slot is the one where the row goes on, if what that slot holds is its beginning; else the one that was used least recently.

        Returns:
          what is to be copied before the row goes on.
        """
        for page in resume.pages:
            self._pages.hold(page)
        row.pages = list(resume.pages)
        row.cached = row.computed = resume.length
        row.sealed = len(row.pages)
        tail = self._tail(self._take_slot(row, resume))
        pairs = ()
        if resume.partial is not None:
            if resume.partial is tail:  # it was this slot's and is nobody else's
                self._pages.hold(resume.partial)
                page, tail = resume.partial, None
            else:
                page = self._pages.take()
                assert page is not None
                if page.number != resume.partial.number:  # else it was just this one that was evicted
                    pairs = ((resume.partial.number, page.number),)
            row.pages.append(page)
        if tail is not None and not tail.gone:
            self._pages.discard(tail)
        self._tell(row, range(len(row.pages)))
        tokens = 0 if self.limits.chunk is None else resume.length % self.limits.chunk
        if tokens and row.slot != resume.source:
            return Copy(resume.source, row.slot, tokens, pairs)
        return Copy(None, None, 0, pairs) if pairs else None

    def extend(self, row: Row, tokens: int) -> bool:
        """Give a row pages for so many tokens; False if there are not enough."""
        while len(row.pages) * self.limits.page < tokens:
            page = self._pages.take()
            if page is None:
                return False
            row.pages.append(page)
            self._tell(row, [len(row.pages) - 1])
        return True

    def seal(self, row: Row) -> None:
        """Let others find the pages that a row has filled with tokens that are known."""
        if self.limits.reuse:
            self._tell(row, self._prefix.seal(row))

    def leave(self, row: Row) -> None:
        """Take a row's slot and pages back, which keep what others can begin with."""
        assert row.slot is not None
        known, start = row.known, self._prefix.chunk_start(row)
        useful = self.limits.reuse and known > start
        pages = row.pages[: self.pages_of(known)]
        for place in reversed(range(len(row.pages))):
            page = row.pages[place]
            self._pages.release(page, keep=page.key is not None or (useful and place < len(pages)))
        del self.running[row.slot]
        self.idle[row.slot] = Retained(row.keys, pages, known, start) if useful else None
        self.idle.move_to_end(row.slot, last=useful)
        row.slot, row.pages = None, []

    def check(self) -> None:
        """Assert what this file and `pages.py` promise."""
        assert sorted([*self.running, *self.idle]) == list(range(self.limits.slots)), "a slot is lost, or is running and idle"
        assert all(row.slot == slot for slot, row in self.running.items()), "a row runs in another slot than it thinks"
        for row in self.running.values():
            assert not self.limits.reuse or row.sealed == row.known // self.limits.page, "a full page is not sealed"
            assert [page.key is not None for page in row.pages].count(True) == row.sealed, "a page is sealed that is not full"
            assert row.computed <= len(row.pages) * self.limits.page, "a row has computed what it has no pages for"
        self._pages.check(page for row in self.running.values() for page in row.pages)

    def _holders(self) -> Iterator[tuple[int, Row | Retained]]:
        yield from self.running.items()
        for slot, retained in self.idle.items():
            if retained is not None:
                yield slot, retained

    def _take_slot(self, row: Row, resume: Resume) -> Retained | None:
        slot, source = next(iter(self.idle)), resume.source
        if source is not None and (held := self.idle.get(source)) is not None:
            if resume.length == held.known:
                slot = source
            else:
                self.idle.move_to_end(source)
        row.slot = slot
        self.running[slot] = row
        return self.idle.pop(slot)

    @staticmethod
    def _tail(held: Retained | None) -> Page | None:
        """The page that only a slot knew which holds this no more."""
        tail = held.pages[-1] if held is not None and held.pages else None
        return None if tail is None or tail.gone or tail.holders or tail.key is not None else tail

    def _tell(self, row: Row, columns: Iterable[int]) -> None:
        assert row.slot is not None
        self.changes += [(row.slot, column, row.pages[column].number) for column in columns]
