"""A cache that is simulated token by token: whatever a plan lets a row read was written behind the same tokens.

    python tests/inference/scheduling/brute.py --traces 100000

runs that many random traces: requests that arrive, share prefixes, stop, are cancelled, expire and preempt each other.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from maverick_jax.inference.checks import NoRoom
from maverick_jax.inference.request import Finish, Full, Request, Row
from maverick_jax.inference.scheduling.plans import Call, Limits, Plan
from maverick_jax.inference.scheduling.scheduler import Scheduler

MOST_PLANS = 5000  # of a trace that takes some hundred


LIMITS = Limits(  # of what is tried by hand
    slots=8,
    pages=64,
    page=4,
    chunk=16,
    max_length=200,
    queue=8,
    decode_rows=(1, 4),
    prefill_rows=(1, 4),
    piece_sizes=(2, 8, 32),
    piece_tokens=32,
)


def ask(max_new_tokens: int, deadline: float | None = None) -> Request:
    """The scheduler looks at nothing else of a request."""
    return Request(ids=np.zeros(1, np.int32), max_new_tokens=max_new_tokens, deadline=deadline)


def step(scheduler: Scheduler, *, now: float = 0.0, budget: int = 8, key: int = 9) -> Plan:
    """A plan whose tokens, all the same, are read at once."""
    plan = scheduler.plan(now, budget)
    for call in plan.calls:
        for part in call.parts:
            if part.samples:
                read(scheduler, scheduler.rows[part.row], key)
    scheduler.check()
    return plan


def read(scheduler: Scheduler, row: Row, key: int = 9) -> None:
    """Deliver a token; end a row that has all it may have."""
    scheduler.deliver(row, key)
    if row.complete and not row.unread:
        scheduler.finish(row, Finish.LENGTH)


class Brute:
    """What every place of a cache holds: which tokens stand before and at the one whose keys are there."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.rings: list[dict[int, int]] = [{} for _ in range(limits.slots)]
        self.places: dict[tuple[int, int], int] = {}
        self.tables: list[dict[int, int]] = [{} for _ in range(limits.slots)]
        self.next: dict[int, int] = {}  # what a row that runs computes next
        self.drawn: collections.Counter[int] = collections.Counter()
        self.computed: collections.Counter[int] = collections.Counter()  # tokens of a row, those computed again included
        self.truth: dict[int, list[int]] = {}  # names of the row's prefixes, one for each of its tokens
        self._names: dict[tuple[int, int], int] = {}

    def extend_truth(self, number: int, keys: Sequence[int]) -> None:
        """What stands in a row, before the scheduler knows it."""
        names = self.truth.setdefault(number, [])
        for key in keys:
            names.append(self._names.setdefault((names[-1] if names else 0, key), len(self._names) + 1))

    def run(self, plan: Plan, rows: dict[int, Row], accepted: Mapping[int, int]) -> None:
        """Do what a plan says, where so many tokens of the rows' drafts stand; assert that it may be done."""
        for number in plan.preempted:
            self.next.pop(number, None)
        for copy in plan.copies:
            if copy.target is not None:
                assert copy.source is not None
                ring = self.rings[copy.source]
                self.rings[copy.target] = {i: ring[i] for i in range(copy.tokens)}
            for source, target in copy.pages:
                assert source != target
                for place in range(self.limits.page):
                    self.places[target, place] = self.places.get((source, place), 0)
        for slot, column, page in plan.table_changes:
            self.tables[slot][column] = page
        for call in plan.calls:
            self._run_call(call, rows, accepted)

    def _run_call(self, call: Call, rows: dict[int, Row], accepted: Mapping[int, int]) -> None:
        limits = self.limits
        assert len({part.slot for part in call.parts}) == len(call.parts) > 0
        sizes = limits.decode_rows if call.kind == "decode" else limits.prefill_rows
        assert call.rows == min(size for size in sizes if size >= len(call.parts))
        if call.kind == "prefill":
            assert call.tokens in limits.piece_sizes
            assert call.rows * call.tokens <= limits.piece_tokens
            assert all((part.start == 0) == call.first for part in call.parts)
        else:
            assert call.tokens == (1 + limits.draft if any(part.length > 1 for part in call.parts) else 1)
        for part in call.parts:
            row = rows[part.row]
            assert row.slot == part.slot
            assert part.start == self.next.get(part.row, row.cached), "a token is computed twice, or never"
            end = part.start + part.length
            total = row.prompt + self.drawn[part.row]
            assert 0 < part.length <= call.tokens, call
            assert part.step == self.drawn[part.row]
            if call.kind == "decode":
                assert part.start == total - 1
                assert part.samples
                assert part.step > 0
                assert end <= row.prompt + row.request.max_new_tokens - 1, "a draft is longer than the answer may be"
            else:
                assert part.samples == (end == total)
            if limits.chunk is not None:
                assert part.start // limits.chunk == (end - 1) // limits.chunk, "a piece crosses a chunk's border"
            self._see(part.row, part.slot, part.start)
        for part in call.parts:
            stand = part.length if call.kind == "prefill" else 1 + accepted.get(part.row, 0)
            self._write(part.row, part.slot, part.start, part.length, stand, rows)
            self.next[part.row] = part.start + stand
            self.computed[part.row] += stand
            self.drawn[part.row] += stand if call.kind == "decode" else part.samples

    def _see(self, number: int, slot: int, start: int) -> None:
        """All that stands before `start` in what the row can see is its own past."""
        truth, page, chunk = self.truth[number], self.limits.page, self.limits.chunk
        table, ring = self.tables[slot], self.rings[slot]
        assert [self.places.get((table[i // page], i % page)) for i in range(start)] == truth[:start], "a page holds another past"
        if chunk is not None:
            first = start - start % chunk
            assert [ring.get(i % chunk) for i in range(first, start)] == truth[first:start], "a chunk buffer holds another past"

    def _write(self, number: int, slot: int, start: int, length: int, stand: int, rows: dict[int, Row]) -> None:
        truth, page, chunk = self.truth[number], self.limits.page, self.limits.chunk
        for column in range(start // page, (start + length - 1) // page + 1):
            written = self.tables[slot][column]
            running = [row for row in rows.values() if row.number != number and row.slot is not None]
            others = (self.tables[row.slot][column] for row in running for column in range(len(row.pages)))
            assert written not in others, "a page that another row holds is written"
        for i in range(start, start + length):
            name = truth[i] if i < start + stand else 0  # of a draft that was refused
            self.places[self.tables[slot][i // page], i % page] = name
            if chunk is not None:
                self.rings[slot][i % chunk] = name


def random_limits(chance: random.Random) -> Limits:
    page = chance.choice([1, 2, 4])
    row_sizes, prefill_rows = (chance.choice([(1,), (1, 2), (1, 2, 4), (1, 4)]) for _ in range(2))
    piece_sizes = chance.choice([(2, 4, 8), (1, 3, 8), (4,), (2, 16)])
    return Limits(
        slots=chance.randint(1, 6),
        pages=chance.choice([chance.randint(16, 32) // page, chance.randint(32, 96) // page, 400 // page]),
        page=page,
        chunk=chance.choice([None, page, 2 * page, 3 * page, 4 * page]),
        max_length=chance.choice([24, 48]),
        queue=chance.choice([2, 20]),
        decode_rows=row_sizes,
        prefill_rows=prefill_rows,
        piece_sizes=piece_sizes,
        draft=chance.choice([0, 1, 3]),
        piece_tokens=max(piece_sizes[-1], chance.choice([4, 8, 16, 32])),
        reuse=chance.random() < 0.9,
    )


@dataclasses.dataclass
class Job:
    """A request of a trace, and what will become of it."""

    row: Row
    answer: list[int]
    stop: int  # tokens after which the model stops


class Trace:
    """A random trace.

    Args:
      seed: of everything in it.
      scheduler: made of the limits; another one records, for example.
    """

    def __init__(self, seed: int, scheduler: type[Scheduler] = Scheduler):
        self.chance = chance = random.Random(seed)
        self.scheduler = scheduler(random_limits(chance))
        self.brute = Brute(self.scheduler.limits)
        self.jobs: dict[int, Job] = {}
        self.texts: list[list[int]] = []  # prompts and answers that others begin with
        self.now = 0.0
        self.unread: collections.deque[list[tuple[int, int]]] = collections.deque()
        self.lag = chance.choice([0, 1, 1, 2])  # plans that are launched before a step's tokens are read
        self.budget = chance.choice([1, 3, 8, 40])
        self.preempted: set[int] = set()
        self.cached = self.drafted = 0

    def run(self, requests: int) -> None:
        """Until all of so many have ended."""
        waiting, plans = requests, 0
        while waiting or not self.scheduler.idle:
            while waiting and (self.chance.random() < 0.4 or self.scheduler.idle):
                waiting -= 1
                self._submit()
            if self.chance.random() < 0.05 and self.scheduler.rows:
                row = self.scheduler.rows[self.chance.choice(list(self.scheduler.rows))]
                self.scheduler.cancel(row)
                assert row.finish is Finish.CANCELLED
            self._step()
            plans += 1
            assert plans < MOST_PLANS, "somebody starves"
        for job in self.jobs.values():
            self._judge(job)
        self.scheduler.check()

    def _submit(self) -> None:
        keys, chance = self._prompt(), self.chance
        most = chance.randint(1, 12)
        request = ask(most, chance.choice([None] * 6 + [chance.randint(0, 40)]))
        limits = self.scheduler.limits
        too_long = len(keys) + most > limits.max_length or -(-(len(keys) + most - 1) // limits.page) > limits.pages
        full = len(self.scheduler.rows) >= limits.slots + limits.queue
        try:
            row = self.scheduler.add(request, keys, self.now, ahead=not limits.draft or chance.random() < 0.5)
        except NoRoom:
            assert too_long
            return
        except Full:
            assert full
            return
        assert not too_long
        assert not full
        answer = [chance.randint(0, 2) for _ in range(most)]
        self.jobs[row.number] = Job(row, answer, chance.randint(1, 20))
        self.brute.extend_truth(row.number, [*keys, *answer])
        self.texts.append([*keys, *answer])

    def _prompt(self) -> list[int]:
        chance = self.chance
        new = [chance.randint(0, 2) for _ in range(chance.randint(1, self.scheduler.limits.max_length // 2))]
        if self.texts and chance.random() < 0.6:
            text = chance.choice(self.texts)
            return text[: chance.randint(1, len(text))] + new[: chance.choice([0, 0, 1, 3, 24])]
        return new

    def _step(self) -> None:
        self.now += 1
        rows = dict(self.scheduler.rows)
        rooms = {number: room for number, row in rows.items() if (room := self.scheduler.draft_room(row))}
        drafts = {number: self.chance.randint(1, room) for number, room in rooms.items() if self.chance.random() < 0.7}
        plan = self.scheduler.plan(self.now, self.budget, drafts)
        self.scheduler.check()
        assert not set(plan.finished) & self.scheduler.rows.keys()
        self.preempted |= set(plan.preempted)
        decoded = {part.row: part for call in plan.calls if call.kind == "decode" for part in call.parts}
        accepted = {number: self.chance.randint(0, part.length - 1) for number, part in decoded.items()}
        self.brute.run(plan, {number: row for number, row in rows.items() if row.finish is None}, accepted)
        self.cached += sum(rows[part.row].cached for call in plan.calls for part in call.parts if part.start == rows[part.row].cached)
        self.drafted += sum(accepted.values())
        self.unread.append([(part.row, accepted.get(part.row, 0)) for call in plan.calls for part in call.parts if part.samples])
        while len(self.unread) > self.lag:
            self._read(self.unread.popleft())
        if not any(self.unread):
            self.unread.clear()

    def _read(self, drawn: list[tuple[int, int]]) -> None:
        for number, accepted in drawn:
            job = self.jobs[number]
            row = job.row
            if not row.ahead:
                self.scheduler.accept(row, accepted)
            for _ in range(1 + accepted):
                self.scheduler.deliver(row, job.answer[len(row.new_tokens)] if row.finish is None else 0)
                if row.finish is None:
                    if len(row.new_tokens) == job.stop:
                        self.scheduler.finish(row, Finish.STOP)
                    elif row.complete and not row.unread:
                        self.scheduler.finish(row, Finish.LENGTH)
        self.scheduler.check()

    def _judge(self, job: Job) -> None:
        row, brute = job.row, self.brute
        assert row.finish is not None
        assert row.new_tokens == job.answer[: len(row.new_tokens)]
        if row.finish in (Finish.STOP, Finish.LENGTH):
            asked = row.request.max_new_tokens
            assert len(row.new_tokens) == min(job.stop, asked)
            assert brute.drawn[row.number] <= min(asked, job.stop + self.lag + 1 + self.scheduler.limits.draft)
            if row.number not in self.preempted:
                assert brute.computed[row.number] == row.prompt + brute.drawn[row.number] - 1 - row.cached, "computed twice"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    args = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    for seed in tqdm(range(args.first, args.first + args.traces)):
        trace = Trace(seed)
        try:
            trace.run(requests=12)
        except Exception:
            print(f"trace {seed}: {trace.scheduler.limits}", file=sys.stderr)
            raise
        counts["rows"] += len(trace.jobs)
        counts["preempted"] += len(trace.preempted)
        counts["tokens computed"] += sum(trace.brute.computed.values())
        counts["drafts accepted"] += trace.drafted
        counts["tokens found"] += trace.cached
        counts.update(str(job.row.finish) for job in trace.jobs.values())
    print(dict(counts))


if __name__ == "__main__":
    main()
