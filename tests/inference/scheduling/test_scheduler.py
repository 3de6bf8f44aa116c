"""Plans of the scheduler: who computes what when, in which shapes, and who must wait or give way."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from brute import LIMITS, Trace, ask, read, step

from maverick_jax.inference.checks import NoRoom
from maverick_jax.inference.request import Finish, Full, Row
from maverick_jax.inference.scheduling.plans import Call, Part, Plan
from maverick_jax.inference.scheduling.prefill import for_many
from maverick_jax.inference.scheduling.scheduler import Scheduler


def prompt(length: int, first: int = 100) -> list[int]:
    """Tokens that no prompt with another `first` has."""
    return list(range(first * 1000, first * 1000 + length))


def decoding(scheduler: Scheduler, rows: int = 1, new: int = 60) -> list[Row]:
    """Rows that are up to date."""
    made = [scheduler.add(ask(new), prompt(2, 900 + i), 0.0) for i in range(rows)]
    while any(row.behind for row in made):
        step(scheduler)
    return made


def rows_of(call: Call) -> list[int]:
    return [part.row for part in call.parts]


@pytest.mark.parametrize("part", range(8))
def test_whatever_comes_every_row_reads_its_own_past(part):
    """Random traces against a cache that is simulated token by token: arrivals, shared prefixes, stops, cancellations, deadlines, few
    pages, steps launched ahead, drafts. `brute.py --traces 100000` tries more."""
    for seed in range(200 * part, 200 * part + 200):
        Trace(seed).run(requests=12)


def test_a_prompt_is_cut_into_pieces_and_then_decodes():
    """A piece ends at the chunk's border, and fills at least half of its program or is the smallest."""
    scheduler = Scheduler(LIMITS)
    row = scheduler.add(ask(3), prompt(21), 0.0)
    calls = [call for _ in range(5) for call in scheduler.plan(0.0, 8).calls]
    assert calls == [
        Call("prefill", (Part(0, 0, 0, 16, False, 0),), 1, 32, True),
        Call("prefill", (Part(0, 0, 16, 5, True, 0),), 1, 8, False),
        Call("decode", (Part(0, 0, 21, 1, True, 1),), 1, 1, False),
        Call("decode", (Part(0, 0, 22, 1, True, 2),), 1, 1, False),
    ]
    assert (row.computed, row.total, row.unread, row.complete) == (23, 24, 3, True)
    for _ in range(3):
        read(scheduler, row)
    assert (row.finish, row.new_tokens) == (Finish.LENGTH, [9, 9, 9])
    scheduler.check()
    assert scheduler.idle


def test_a_piece_that_fills_less_than_half_is_cut():
    """9 tokens in a program for 32 would compute 23 for nothing."""
    scheduler = Scheduler(LIMITS)
    scheduler.add(ask(1), prompt(9), 0.0)
    assert [(c.parts[0].length, c.tokens) for _ in range(2) for c in step(scheduler).calls] == [(8, 8), (1, 2)]


def test_prompts_of_like_length_share_a_call():
    """Every call reads all experts. A row that goes on does not share one with rows at their first token."""
    scheduler = Scheduler(LIMITS)
    scheduler.add(ask(1), prompt(21, 1), 0.0)
    step(scheduler)
    for i in range(2, 6):
        scheduler.add(ask(1), prompt(7, i), 0.0)
    scheduler.add(ask(1), prompt(2, 6), 0.0)
    calls = [step(scheduler).calls for _ in range(3)]
    assert [[(rows_of(c), c.rows, c.tokens, c.first) for c in some] for some in calls] == [
        [([0], 1, 8, False)],
        [([1, 2, 3, 4], 4, 8, True)],
        [([5], 1, 2, True)],
    ]


def test_rows_that_are_up_to_date_decode_in_every_plan():
    """Whatever prompts come: nobody who decodes stands still. More rows than the largest program has take several calls."""
    scheduler = Scheduler(replace(LIMITS, slots=8, pages=200, queue=20))
    rows = decoding(scheduler, 6, new=60)
    for i in range(8):
        scheduler.add(ask(5), prompt(40, i), 0.0)
        calls = step(scheduler).calls
        parts = [part.row for call in calls if call.kind == "decode" for part in call.parts]
        assert {row.number for row in rows} <= set(parts)
        assert [call.kind for call in calls] == sorted(call.kind for call in calls), "decode comes first"
        assert [len(call.parts) for call in calls[:2]] == [4, len(parts) - 4]


def test_the_budget_of_eight_plans_pays_for_one_piece_of_eight_times_its_size():
    """Beside decode steps, so that a small budget does not mean small pieces. Before a prompt is there only the smallest is saved for."""
    scheduler = Scheduler(replace(LIMITS, chunk=64))
    decoding(scheduler)
    for _ in range(20):
        step(scheduler, budget=4)
    scheduler.add(ask(1), prompt(120), 0.0)
    sizes = [[call.tokens for call in step(scheduler, budget=4).calls[1:]] for _ in range(25)]
    assert [i for i, size in enumerate(sizes) if size] == [6, 14, 22]
    assert [size for size in sizes if size] == [[32]] * 3


def test_pieces_beside_decode_steps_are_no_longer_than_what_is_saved():
    """A piece of 32 would hold up those who decode, where 1 token per step is given away."""
    scheduler = Scheduler(replace(LIMITS, chunk=64))
    decoding(scheduler)
    scheduler.add(ask(1), prompt(30), 0.0)
    sizes = [call.tokens for _ in range(30) for call in step(scheduler, budget=1).calls if call.kind == "prefill"]
    assert sizes == [8, 8, 8]


def test_a_prompt_is_read_however_little_time_is_left_for_it():
    """The smallest piece at least in every eighth plan: what was measured may be wrong."""
    scheduler = Scheduler(replace(LIMITS, chunk=64, piece_sizes=(32,)))
    decoding(scheduler)
    scheduler.add(ask(1), prompt(60), 0.0)
    read = [i for i in range(30) for call in step(scheduler, budget=1).calls if call.kind == "prefill"]
    assert read == [7, 15]


def test_many_prompts_are_read_sooner_than_one():
    """Four fifths of a budget for each, up to five; and beside few that decode as much as is their share."""
    assert [for_many(100, behind, 20) for behind in (1, 2, 3, 4, 5, 6, 20)] == [100, 160, 240, 320, 400, 400, 400]
    assert [for_many(100, 9, decoding) for decoding in (1, 2, 5, 10)] == [3200, 1600, 640, 400]
    assert for_many(100, 1, 1) == 100


def test_a_short_prompt_waits_for_one_piece_of_a_long_one():
    """And the long one for one short one."""
    scheduler = Scheduler(replace(LIMITS, prefill_rows=(1,)))
    scheduler.add(ask(1), prompt(80, 1), 0.0)
    for i in range(2, 5):
        scheduler.add(ask(1), prompt(7, i), 0.0)
    assert [rows_of(call) for _ in range(7) for call in step(scheduler).calls] == [[0], [1], [0], [2], [0], [3], [0]]


@pytest.mark.parametrize("seed", range(5))
def test_the_oldest_row_has_every_second_prefill_call(seed):
    """So nobody starves: whoever waits becomes the oldest."""
    chance = random.Random(seed)
    scheduler = Scheduler(replace(LIMITS, pages=400, queue=100))
    missed = number = 0
    for _ in range(300):
        if chance.random() < 0.6 and number < 90:
            number += 1
            scheduler.add(ask(chance.randint(1, 6)), prompt(chance.choice([1, 3, 7, 90]), number), 0.0)
        behind = [row.number for row in scheduler.rows.values() if row.behind]
        for call in step(scheduler, budget=chance.randint(1, 8)).calls:
            if call.kind == "prefill":
                oldest = min(behind, default=None)
                missed = missed + 1 if oldest not in rows_of(call) else 0
                assert missed <= 1
                behind = [number for number in behind if number not in rows_of(call)]  # a row computes one piece per plan
    while not scheduler.idle:
        step(scheduler)
    assert number == 90


def test_the_youngest_gives_way_and_goes_on_where_it_was():
    """Its tokens are computed again, those that it drew among them; it draws no token twice."""
    scheduler = Scheduler(replace(LIMITS, pages=8, chunk=None))
    old, young = (scheduler.add(ask(14), prompt(8, i), 0.0) for i in range(2))
    drawn, preempted = {0: [], 1: []}, []
    while not scheduler.idle:
        plan = step(scheduler)
        preempted += plan.preempted
        for call in plan.calls:
            for part in call.parts:
                drawn[part.row] += [part.step] * part.samples
    assert preempted == [1]
    assert drawn == {0: list(range(14)), 1: list(range(14))}
    assert old.finish is young.finish is Finish.LENGTH


def test_a_preempted_row_waits_until_its_tokens_are_read():
    """What is to be computed again must be known."""
    scheduler = Scheduler(replace(LIMITS, pages=5, chunk=None, reuse=False))
    old, young = (scheduler.add(ask(8), prompt(7, i), 0.0) for i in range(2))
    plans = [scheduler.plan(0.0, 8) for _ in range(3)]  # prefill, and two steps: each needs a third page then
    assert plans[2].preempted == (1,)
    assert (young.unread, young.slot) == (2, None)
    for _ in range(6):  # of the old one all are drawn
        scheduler.plan(0.0, 8)
    for _ in range(8):
        read(scheduler, old)
    assert not scheduler.plan(0.0, 8).calls
    scheduler.check()
    for _ in range(2):
        read(scheduler, young)
    (call,) = scheduler.plan(0.0, 8).calls
    assert call.parts == (Part(1, young.slot, 0, 8, False, 2),)


def test_a_cancelled_row_gives_its_slot_and_pages_away_at_once():
    """Its tokens that come later are ignored."""
    scheduler = Scheduler(replace(LIMITS, slots=1, pages=2, chunk=None))
    row = scheduler.add(ask(2), prompt(7, 1), 0.0)
    scheduler.plan(0.0, 8)
    other = scheduler.add(ask(2), prompt(7, 2), 0.0)
    scheduler.cancel(row)
    scheduler.check()
    plan = scheduler.plan(0.0, 8)
    assert plan.finished == (0,)
    assert rows_of(plan.calls[0]) == [1]
    scheduler.deliver(row, 5)
    scheduler.cancel(row)
    assert row.new_tokens == []
    for _ in range(2):
        scheduler.plan(0.0, 8)
    for _ in range(2):
        read(scheduler, other)
    assert scheduler.idle
    scheduler.check()


def test_a_deadline_ends_rows_that_wait_and_rows_that_run():
    """In the first plan that is not before it."""
    scheduler = Scheduler(replace(LIMITS, slots=1))
    running = scheduler.add(ask(50, deadline=2.0), prompt(7, 1), 10.0)
    waiting = scheduler.add(ask(50, deadline=1.0), prompt(7, 2), 10.5)
    assert [step(scheduler, now=now).finished for now in (10.0, 11.4, 11.5, 11.9, 12.0)] == [(), (), (1,), (), (0,)]
    assert running.finish is waiting.finish is Finish.DEADLINE
    assert running.new_tokens
    assert scheduler.idle


def test_what_never_fits_is_refused_at_once():
    """By the length that there is room for, or by the pages that there are. The token that is drawn last needs no place."""
    scheduler = Scheduler(replace(LIMITS, max_length=20))
    with pytest.raises(NoRoom, match=r"^the prompt has 18 tokens and up to 3 are asked for, but 20 is the longest"):
        scheduler.add(ask(3), prompt(18), 0.0)
    scheduler.add(ask(2), prompt(18), 0.0)
    scheduler = Scheduler(replace(LIMITS, pages=5))
    with pytest.raises(NoRoom, match=r"but the cache holds 20: "):
        scheduler.add(ask(4), prompt(18), 0.0)
    row = scheduler.add(ask(3), prompt(18), 0.0)
    while not scheduler.idle:
        step(scheduler)
    assert len(row.new_tokens) == 3


def test_who_finds_a_slot_does_not_wait():
    """Before the next plan nobody has a slot yet: a burst of as many as there are slots fits without a queue."""
    scheduler = Scheduler(replace(LIMITS, slots=2, queue=0))
    for i in range(2):
        scheduler.add(ask(1), prompt(5, i), 0.0)
    with pytest.raises(Full):
        scheduler.add(ask(1), prompt(5, 3), 0.0)


def test_a_full_queue_refuses_and_changes_nothing():
    """Rows that run do not count."""
    scheduler = Scheduler(replace(LIMITS, slots=1, queue=2))
    scheduler.add(ask(5), prompt(3, 1), 0.0)
    step(scheduler)
    for i in (2, 3):
        scheduler.add(ask(1), prompt(3, i), 0.0)
    with pytest.raises(Full, match=r"^2 requests wait already"):
        scheduler.add(ask(1), prompt(3, 4), 0.0)
    scheduler.check()
    assert len(scheduler.rows) == 3
    while not scheduler.idle:
        step(scheduler)
    assert scheduler.add(ask(1), prompt(3, 4), 0.0).number == 3


def test_no_row_begins_that_would_soon_be_preempted():
    """There are pages for its prompt and for what the others still need of theirs, or it waits."""
    scheduler = Scheduler(replace(LIMITS, pages=12, chunk=8))
    scheduler.add(ask(1), prompt(30, 1), 0.0)
    scheduler.add(ask(1), prompt(14, 2), 0.0)  # 8 + 4 pages, and one to spare
    while not scheduler.idle:
        plan = step(scheduler)
        assert not plan.preempted
        assert len({part.row for call in plan.calls for part in call.parts}) <= 1


def test_a_draft_ends_at_the_border_and_at_the_last_token_but_one():
    """A refused token would have written over the chunk before; and the token that is drawn behind a draft is one of the answer's."""
    scheduler = Scheduler(replace(LIMITS, draft=3))
    row = scheduler.add(ask(7), prompt(13), 0.0, ahead=False)
    rooms, parts = [], []
    while row.finish is None:
        rooms.append(scheduler.draft_room(row))
        plan = scheduler.plan(0.0, 8, {row.number: rooms[-1]})
        parts += [(part.start, part.length, call.tokens) for call in plan.calls for part in call.parts]
        if not row.behind:
            assert not scheduler.plan(0.0, 8).calls, "before it is known what stands, nothing can go on behind it"
            scheduler.accept(row, rooms[-1] and 1)
            for _ in range(row.unread):
                read(scheduler, row)
        scheduler.check()
    assert parts == [(0, 8, 8), (8, 5, 8), (13, 3, 4), (15, 1, 1), (16, 3, 4), (18, 1, 1)]
    assert rooms == [0, 0, 2, 0, 2, 0]
    assert len(row.new_tokens) == 7


def test_rows_with_and_without_a_draft_share_a_call():
    """Every call reads all weights. Those without one are launched ahead as ever."""
    scheduler = Scheduler(replace(LIMITS, draft=3))
    (ahead,) = decoding(scheduler)
    row = scheduler.add(ask(9), prompt(5), 0.0, ahead=False)
    while row.behind:
        scheduler.plan(0.0, 8)
    scheduler.accept(row, 0)
    scheduler.deliver(row, 9)
    (call,) = scheduler.plan(0.0, 8, {row.number: 2}).calls
    assert (rows_of(call), [part.length for part in call.parts], call.tokens) == ([ahead.number, row.number], [1, 3], 4)
    (call,) = scheduler.plan(0.0, 8).calls
    assert (rows_of(call), call.tokens) == ([ahead.number], 1)
    scheduler.cancel(row)
    scheduler.accept(row, 2)
    scheduler.check()


def test_a_draft_takes_no_page_from_others():
    """It would be a bad bargain: a token that may stand for a row that is computed again."""
    scheduler = Scheduler(replace(LIMITS, draft=3, pages=5, chunk=None, reuse=False))
    row = scheduler.add(ask(3), prompt(7, 1), 0.0, ahead=False)
    other = scheduler.add(ask(9), prompt(7, 2), 0.0)
    for _ in range(3):
        scheduler.plan(0.0, 8)
    assert len(other.pages) == 3
    scheduler.accept(row, 0)
    scheduler.deliver(row, 9)
    assert scheduler.draft_room(row) == 1
    plan = scheduler.plan(0.0, 8, {row.number: 1})
    assert plan.preempted == ()
    assert [(part.row, part.length) for part in plan.calls[0].parts] == [(other.number, 1), (row.number, 1)]


def test_a_plan_is_a_line():
    """That comes back as the same plan, on the other processes and in a replay."""
    scheduler = Scheduler(LIMITS)
    for _ in range(3):
        scheduler.add(ask(3), prompt(10), 0.0)
    plans = [step(scheduler) for _ in range(4)]
    assert any(plan.copies for plan in plans)
    for plan in plans:
        assert "\n" not in plan.as_json()
        assert Plan.from_json(plan.as_json()) == plan
