"""Where a row can begin: full pages, chunk borders, and slots that still hold the chunk."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from brute import LIMITS, ask, step

from maverick_jax.inference.request import Finish, Row
from maverick_jax.inference.scheduling.plans import Copy, Limits, Plan
from maverick_jax.inference.scheduling.prefix import Prefix, common
from maverick_jax.inference.scheduling.scheduler import Scheduler

TEXT = list(range(1000, 1200))
OTHER = list(range(2000, 2200))


def served(scheduler: Scheduler, keys: list[int], new: int = 1) -> Row:
    """A row that has come and gone."""
    row = scheduler.add(ask(new), keys, 0.0)
    while row.finish is None:
        step(scheduler)
    return row


def first_plan(scheduler: Scheduler, keys: list[int]) -> tuple[Row, Plan]:
    """A row that has just begun, and the plan in which it did."""
    row = scheduler.add(ask(5), keys, 0.0)
    return row, step(scheduler)


def limits(**changes: object) -> Limits:
    return replace(LIMITS, **changes)


def test_a_conversation_goes_on_in_its_slot():
    """Nothing is copied: a turn computes what is new. The last token drawn was never computed."""
    scheduler = Scheduler(limits())
    row = served(scheduler, TEXT[:6], new=3)
    assert row.keys == [*TEXT[:6], 9, 9, 9]
    turn, plan = first_plan(scheduler, [*row.keys, *OTHER[:4]])
    assert turn.cached == 8
    assert plan.copies == ()
    assert turn.slot == 0


def test_inside_a_chunk_a_slot_is_copied_as_far_as_both_agree():
    """With the page that they share a part of; what was there stays for whoever continues it."""
    scheduler = Scheduler(limits())
    old = served(scheduler, TEXT[:12])
    row, plan = first_plan(scheduler, [*TEXT[:6], *OTHER[:4]])
    assert row.cached == 6
    assert plan.copies == (Copy(0, row.slot, 6, ((1, row.pages[1].number),)),)
    assert row.slot != 0
    again, plan = first_plan(scheduler, [*old.keys, 1, 2])
    assert (again.cached, again.slot, plan.copies) == (12, 0, ())


def test_at_a_chunks_border_no_slot_is_needed():
    """The rows that were there are gone, their pages are not."""
    scheduler = Scheduler(limits(slots=1, chunk=8))
    served(scheduler, TEXT[:22])
    served(scheduler, OTHER[:5])
    row, plan = first_plan(scheduler, [*TEXT[:22], *OTHER[:4]])
    assert row.cached == 16
    assert plan.copies == ()
    assert len({page for _, _, page in plan.table_changes[:4]}) == 4


def test_behind_the_chunk_that_a_slot_holds_nothing_begins_in_an_older_one():
    """Its buffers hold the newest chunk alone; the pages of the border before can be used."""
    scheduler = Scheduler(limits(chunk=8))
    served(scheduler, TEXT[:22])
    assert first_plan(scheduler, [*TEXT[:13], *OTHER[:4]])[0].cached == 8
    assert first_plan(scheduler, [*TEXT[:19], *OTHER[:4]])[0].cached == 19


def test_a_step_launched_ahead_across_the_border_takes_the_chunk_with_it():
    """A stop token at the end of a chunk: the next step has written over the chunk's first entry before anybody knew."""
    scheduler = Scheduler(limits(chunk=8))
    row = scheduler.add(ask(50), TEXT[:6], 0.0)
    for _ in range(4):
        scheduler.plan(0.0, 8)
    for key in (7, 7, 7):
        scheduler.deliver(row, key)
    assert (row.computed, row.known) == (9, 9)
    scheduler.finish(row, Finish.STOP)
    assert first_plan(scheduler, [*TEXT[:6], 7, 5, 5])[0].cached == 0, "place 0 of the buffer holds token 8 now"
    scheduler.check()


def test_tokens_that_were_never_read_are_not_found():
    """A cancelled row has computed tokens that nobody knows."""
    scheduler = Scheduler(limits())
    row = scheduler.add(ask(50), TEXT[:6], 0.0)
    for _ in range(4):
        scheduler.plan(0.0, 8)
    scheduler.cancel(row)
    assert first_plan(scheduler, [*TEXT[:6], 9, 9, 9])[0].cached == 6


def test_n_answers_to_one_prompt_compute_it_once():
    """The others wait for the first, and then compute one token each, which they draw from."""
    scheduler = Scheduler(limits(slots=5))
    rows = [scheduler.add(ask(3), TEXT[:24], 0.0) for _ in range(4)]
    parts = []
    while not scheduler.idle:
        parts += [part for call in step(scheduler).calls if call.kind == "prefill" for part in call.parts]
    assert [(part.row, part.start, part.length) for part in parts] == [(0, 0, 16), (0, 16, 8), (1, 23, 1), (2, 23, 1), (3, 23, 1)]
    assert all(row.finish is Finish.LENGTH for row in rows)


def test_whoever_waits_for_a_prompt_lets_others_pass():
    """And waits no longer when that prompt is given up."""
    scheduler = Scheduler(limits())
    leader = scheduler.add(ask(3), TEXT[:30], 0.0)
    follower, other = scheduler.add(ask(3), TEXT[:29], 0.0), scheduler.add(ask(3), OTHER[:30], 0.0)
    step(scheduler)
    assert (follower.slot, other.slot) == (None, 1)
    scheduler.cancel(leader)
    scheduler.check()
    step(scheduler)
    assert follower.slot is not None
    assert follower.cached == 16


@pytest.mark.parametrize("reusable", [0, 10, 16, 29])
def test_what_may_be_reused_has_an_end(reusable):
    """A row begins within what it may reuse, be it there already or about to come, and waits for nobody where that is little."""
    scheduler = Scheduler(limits())
    served(scheduler, TEXT[:29])
    row = scheduler.add(ask(5), TEXT[:30], 0.0, reusable=reusable)
    step(scheduler)
    assert row.cached == {10: 0}.get(reusable, reusable)
    scheduler = Scheduler(limits())
    scheduler.add(ask(3), TEXT[:30], 0.0)
    row = scheduler.add(ask(3), TEXT[:29], 0.0, reusable=reusable)
    step(scheduler)
    assert (row.slot is None) == (reusable > 14)


def test_nobody_waits_for_little():
    """Half of what is to be computed must be saved by it."""
    scheduler = Scheduler(limits())
    rows = [scheduler.add(ask(3), [*TEXT[:10], *tail], 0.0) for tail in (OTHER[:12], OTHER[20:32])]
    step(scheduler)
    assert all(row.slot is not None for row in rows)


def test_who_computes_what_is_there_takes_it():
    """Where buffers are gone, tokens are computed again; their pages are not kept twice."""
    scheduler = Scheduler(limits(slots=1, chunk=64))
    served(scheduler, TEXT[:22])
    served(scheduler, OTHER[:5])
    row = scheduler.add(ask(9), TEXT[:22], 0.0)
    plan = step(scheduler)
    assert row.cached == 0
    own = [page for _, _, page in plan.table_changes]
    while row.behind:
        step(scheduler)
    assert not set(own[:5]) & {page.number for page in row.pages[:5]}
    assert (0, 4, row.pages[4].number) in step(scheduler).table_changes


def test_without_chunks_any_place_will_do():
    """A dense model has pages only. All of a prompt but one token, whose page is copied because another may find it."""
    scheduler = Scheduler(limits(chunk=None, slots=1))
    served(scheduler, TEXT[:16])
    served(scheduler, OTHER[:5])
    row, plan = first_plan(scheduler, TEXT[:16])
    assert row.cached == 15
    ((copy,),) = (plan.copies,)
    assert (copy.source, copy.target, len(copy.pages)) == (None, None, 1)


def test_a_page_that_was_evicted_is_not_found():
    """The first ones of a prompt stay longest, for the others are of no use without them."""
    scheduler = Scheduler(limits(chunk=4, slots=2, pages=8))
    served(scheduler, TEXT[:25])
    served(scheduler, OTHER[:17])  # 5 of 8 pages, so that 3 of the others' 7 remain
    assert served(scheduler, TEXT[:25]).cached == 12


def test_the_slot_that_was_used_least_recently_goes_first():
    """A conversation outlives others as long as it goes on."""
    scheduler = Scheduler(limits(slots=3))
    first, second, _ = (served(scheduler, keys) for keys in (TEXT[:9], OTHER[:9], TEXT[50:59]))
    first = served(scheduler, [*first.keys, 1])
    served(scheduler, OTHER[50:59])
    assert first_plan(scheduler, [*first.keys, 2])[0].cached == 11
    assert first_plan(scheduler, [*second.keys, 2])[0].cached == 0


def test_reuse_can_be_switched_off():
    """Everything is computed, and every page is free when nobody runs."""
    scheduler = Scheduler(limits(reuse=False))
    row = served(scheduler, TEXT[:12], new=3)
    assert scheduler._slots._pages._cached == {}
    assert first_plan(scheduler, [*row.keys, 1])[0].cached == 0


def test_keys_are_compared_and_not_their_hashes():
    """Of a part of a picture the key is a large negative number."""
    scheduler = Scheduler(limits(chunk=4))
    picture = [-(2**62) - i for i in range(8)]
    served(scheduler, [*picture, 1])
    assert hash(-1) == hash(-2)
    assert first_plan(scheduler, [*picture, 2])[0].cached == 8
    served(scheduler, [-1, -1, -1, -1, 1])
    assert first_plan(scheduler, [-2, -2, -2, -2, 1])[0].cached == 0


def test_a_prompt_like_no_other_pays_for_one_page(monkeypatch):
    """Whatever its length and whatever is there."""
    scheduler = Scheduler(limits(slots=64, pages=600, max_length=10_000, chunk=None))
    for i in range(64):
        served(scheduler, [5, 5, 5, *range(i * 1000, i * 1000 + 20)])
    packed, compared = [], []
    pack = Prefix._pack
    monkeypatch.setattr(Prefix, "_pack", lambda self, keys, place: packed.append(place) or pack(self, keys, place))
    monkeypatch.setattr("maverick_jax.inference.scheduling.prefix.common", lambda *args: compared.append(args) or common(*args))
    row = Row(0, ask(1), [5, 5, 5, *range(100_000, 108_000)], prompt=8003, reusable=8003, total=8003)
    assert scheduler._slots.find(row).length == 3
    assert packed == [0]
    assert len(compared) == 1


@pytest.mark.parametrize("seed", range(3))
def test_common_is_the_length_of_what_agrees(seed):
    """Across the stretches that are compared at once."""
    chance = random.Random(seed)
    for _ in range(200):
        a = [chance.randint(0, 1) for _ in range(chance.choice([1, 255, 256, 257, 700]))]
        b = a[: chance.randint(0, len(a))] + [7] * 5
        stop = chance.randint(0, min(len(a), len(b)))
        expected = next((i for i in range(stop) if a[i] != b[i]), stop)
        assert common(a, b, 0, stop) == common(a, b, expected // 2, stop) == expected
