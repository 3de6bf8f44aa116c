"""The pool of pages: what is taken, kept, found, evicted; and that its own check sees what is wrong."""

from __future__ import annotations

import pytest

from maverick_jax.inference.scheduling.pages import Page, Pages


def filled(pages: Pages, *texts: bytes) -> list[Page]:
    """A row's pages, which others can find."""
    made: list[Page] = []
    for text in texts:
        page = pages.take()
        assert page is not None
        pages.seal(page, (made[-1] if made else None, text))
        made.append(page)
    return made


def give_back(pages: Pages, row: list[Page], *, keep: bool = True) -> None:
    for page in reversed(row):
        pages.release(page, keep=keep)


def test_every_page_can_be_taken_once():
    """And none is taken that somebody holds."""
    pages = Pages(3)
    taken = [pages.take() for _ in range(3)]
    assert sorted(page.number for page in taken) == [0, 1, 2]
    assert pages.take() is None
    pages.release(taken[1], keep=False)
    assert pages.take().number == taken[1].number


def test_a_page_that_two_hold_stays_until_both_have_left():
    """Then it is found until somebody needs it."""
    pages = Pages(1)
    (page,) = row = filled(pages, b"a")
    pages.hold(page)
    give_back(pages, row)
    assert pages.available == 0
    give_back(pages, row)
    assert pages.available == 1
    assert pages.find((None, b"a")) is page
    pages.hold(page)
    assert pages.take() is None
    give_back(pages, row)
    new = pages.take()
    assert (new.number, page.gone, pages.find((None, b"a"))) == (page.number, True, None)


def test_the_least_recently_used_is_evicted_and_of_a_row_the_last():
    """A page without those before it cannot be found."""
    pages = Pages(4)
    old, new = filled(pages, b"a", b"b"), filled(pages, b"c", b"d")
    give_back(pages, new)
    give_back(pages, old)
    pages.hold(new[0])  # used again
    pages.release(new[0], keep=True)
    order = [new[1], old[1], old[0], new[0]]
    for i, page in enumerate(order):
        assert [p.gone for p in order] == [True] * i + [False] * (4 - i)
        assert pages.take().number == page.number


def test_the_same_tokens_behind_others_are_another_page():
    """A page is what stands in it and all that stands before."""
    pages = Pages(4)
    a, b = filled(pages, b"a", b"x"), filled(pages, b"b", b"x")
    assert pages.find((a[0], b"x")) is a[1]
    assert pages.find((b[0], b"x")) is b[1]
    assert pages.find((None, b"x")) is None


def test_the_check_sees_what_it_should():
    """A page lost, held by more than its count says, cached while it is held, or found though it is gone."""

    def broken(damage) -> None:
        pages = Pages(3)
        held, cached = filled(pages, b"a"), filled(pages, b"b")
        give_back(pages, cached)
        pages.check(held)
        damage(pages, held[0], cached[0])
        with pytest.raises(AssertionError):
            pages.check(held)

    broken(lambda pages, held, cached: pages._free.pop())
    broken(lambda pages, held, cached: pages._free.append(0))
    broken(lambda pages, held, cached: setattr(held, "holders", 2))
    broken(lambda pages, held, cached: pages._cached.update({held: None}))
    broken(lambda pages, held, cached: pages._cached.pop(cached))
    broken(lambda pages, held, cached: pages._found.pop(held.key))
    broken(lambda pages, held, cached: setattr(cached, "gone", True))
