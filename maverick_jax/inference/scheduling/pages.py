"""Pages of the cache of the layers that see everything: who holds them, and which are kept for a prompt that begins alike.

Always: every page is free, held by as many rows as its count says, or cached (held by none and kept for later). A page that two rows
hold, or that can be found by its keys, is never written. Whoever holds a page holds those before it, and gives it back before them:
of a sequence the last pages are evicted first, and the parent of a page that is there is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

Key = tuple["Page | None", bytes]  # the page before, and the keys of this page's tokens as int64


class Page:
    """One use of a page, from its being taken to its being given back or evicted.

    Attributes:
      number: which page of the cache it is.
      holders: rows that hold it.
      key: by which others find it; None for one that is not full.
      gone: whether the number has been given to somebody else since.
    """

    __slots__ = ("gone", "holders", "key", "number")

    def __init__(self, number: int):
        self.number = number
        self.holders = 0
        self.key: Key | None = None
        self.gone = False


class Pages:
    """All pages of a cache, by their numbers 0 to `count` - 1."""

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._cached: OrderedDict[Page, None] = OrderedDict()  # least recently used first
        self._found: dict[Key, Page] = {}

    @property
    def available(self) -> int:
        """Pages that can be taken: free or cached."""
        return len(self._free) + len(self._cached)

    def take(self) -> Page | None:
        """A page for one row to write: a free one, else the least recently used of the cached ones, else None."""
        if not self._free:
            if not self._cached:
                return None
            self.discard(next(iter(self._cached)))
        page = Page(self._free.pop())
        page.holders = 1
        return page

    def hold(self, page: Page) -> None:
        """One more row holds a page that is there."""
        assert not page.gone
        if not page.holders:
            del self._cached[page]
        page.holders += 1

    def release(self, page: Page, *, keep: bool) -> None:
        """A row gives a page back. If it was the last: `keep` makes the page cached, otherwise it is free."""
        page.holders -= 1
        if not page.holders:
            self._cached[page] = None
            if not keep:
                self.discard(page)

    def discard(self, page: Page) -> None:
        """Free a cached page."""
        del self._cached[page]
        page.gone = True
        if page.key is not None:
            del self._found[page.key]
        self._free.append(page.number)

    def find(self, key: Key) -> Page | None:
        """The page that holds these tokens behind those of the page before."""
        return self._found.get(key)

    def seal(self, page: Page, key: Key) -> None:
        """From now on a full page is found by its key, and never written again."""
        assert page.key is None
        assert key not in self._found
        page.key = key
        self._found[key] = page

    def check(self, held: Iterable[Page]) -> None:
        """Assert what this file's first lines say, given the pages of every row."""
        count: dict[Page, int] = {}
        for page in held:
            count[page] = count.get(page, 0) + 1
        assert all(page.holders == n and not page.gone for page, n in count.items()), "a page is held by others than its count says"
        assert not any(page.holders or page.gone for page in self._cached), "a cached page is held, or was given away"
        numbers = [page.number for page in (*count, *self._cached)]
        assert sorted(numbers + self._free) == list(range(self.count)), "a page is lost, or is two things at once"
        for key, page in self._found.items():
            assert page.key is key, "a page is found by another's key"
            assert page in count or page in self._cached, "a page is found that is not there"
            before = key[0]
            assert before is None or (before in count or before in self._cached), "a page is there, and the one before it is not"
        assert all(page.key is None or page.key in self._found for page in count), "a sealed page cannot be found"
