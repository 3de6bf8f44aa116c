"""Who computes what in the next step of the engine: rows that are up to date decode, and the others compute pieces of their prompts.

Always: a row that has not ended is waiting, waits for an older row's prompt or for its own tokens to be read, or runs in a slot; one that
runs is behind, decodes, waits for `accept`, or has drawn all its tokens. The oldest row is never preempted, so that something always ends.
What a row reads was launched before: `plan` counts what it launches as computed, and finds prefixes before it does.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from operator import attrgetter

from maverick_jax.inference.checks import NoRoom
from maverick_jax.inference.request import Finish, Full, Request, Row
from maverick_jax.inference.scheduling.plans import Call, Copy, Limits, Part, Plan
from maverick_jax.inference.scheduling.prefill import Credit, Piece, alike, fit, for_many, in_turn, next_piece
from maverick_jax.inference.scheduling.prefix import Resume, common
from maverick_jax.inference.scheduling.slots import Slots

age = attrgetter("number")


class Scheduler:
    """Plans the steps of an engine.

    Steps are launched ahead: a token may be delivered after plans that go on behind it were made.

    Attributes:
      rows: those that have not ended, by number.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.rows: dict[int, Row] = {}
        self._count = 0
        self._slots = Slots(limits)
        self._credit = Credit(limits.piece_sizes[0])
        self._oldest_leads = True
        self._waiting: list[Row] = []  # by age
        self._stuck: Row | None = None  # the oldest, for which there were no pages when last somebody left
        self._behind: list[Row] = []  # by age
        self._decoding: dict[int, Row] = {}
        self._held: set[int] = set()  # numbers of rows that wait for `accept`
        self._full: list[Row] = []  # whose next token may need a page
        self._deadlines: list[tuple[float, int]] = []
        self._finished: list[int] = []  # since the last plan, as the next
        self._preempted: list[int] = []

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.rows

    @property
    def has_deadlines(self) -> bool:
        """Whether the time of the next plan matters."""
        return bool(self._deadlines)

    @property
    def available_pages(self) -> int:
        """Pages that no row holds, those kept for prefixes included."""
        return self._slots.available

    def add(self, request: Request, keys: Sequence[int], now: float, *, ahead: bool = True, reusable: int | None = None) -> Row:
        """Take a request in.

        Args:
          keys: of the prompt's tokens, see `Row`.
          now: seconds, as in `plan`.
          ahead: whether steps are planned before the last one's token is read. If not, the row may have drafts, and after each step
            waits for `accept`.
          reusable: how many tokens may be taken from what others have computed; None: all.

        Raises:
          NoRoom: prompt and answer can never fit.
          Full: as many wait as may wait.
        """
        limits = self.limits
        tokens = len(keys) + request.max_new_tokens
        asked = f"the prompt has {len(keys)} tokens and up to {request.max_new_tokens} are asked for"
        if tokens > limits.max_length:
            raise NoRoom(f"{asked}, but {limits.max_length} is the longest there is room for: shorten the prompt or lower max_new_tokens.")
        if self._slots.pages_of(tokens - 1) > limits.pages:  # what is drawn last is never read
            raise NoRoom(f"{asked}, but the cache holds {limits.pages * limits.page}: shorten the prompt or lower max_new_tokens.")
        if len(self.rows) >= limits.slots + limits.queue:
            raise Full(f"{limits.queue} requests wait already, as many as may: send this one again later.")
        most = len(keys) if reusable is None else reusable
        row = Row(self._count, request, list(keys), prompt=len(keys), reusable=most, total=len(keys), ahead=ahead)
        self._count += 1
        self.rows[row.number] = row
        self._waiting.append(row)
        if request.deadline is not None:
            row.expires = now + request.deadline
            insort(self._deadlines, (row.expires, row.number))
        return row

    def cancel(self, row: Row) -> None:
        """End a row now; one that has ended stays as it is. Its slot and pages serve others from the next plan on."""
        if row.finish is None:
            self.finish(row, Finish.CANCELLED)
            self._finished.append(row.number)

    def finish(self, row: Row, why: Finish) -> None:
        """End a row whose last token was delivered, or which failed. What it computed remains for others to begin with."""
        assert row.finish is None
        row.finish = why
        del self.rows[row.number]
        self._held.discard(row.number)
        if row.slot is not None:
            self._leave(row)
        elif row in self._waiting:
            self._waiting.remove(row)
        if row.expires is not None:
            self._deadlines.remove((row.expires, row.number))

    def deliver(self, row: Row, key: int) -> None:
        """A drawn token has been read; in order. The row goes on until `finish` ends it; what comes after that is ignored."""
        if row.finish is not None:
            return
        assert row.unread > 0
        row.keys.append(key)
        if row.slot is not None:
            if len(row.keys) >= (row.sealed + 1) * self.limits.page:
                self._slots.seal(row)
        elif row.unread == 0 and not row.complete:
            insort(self._waiting, row, key=age)

    def draft_room(self, row: Row) -> int:
        """How long a draft may be in the next plan: up to the chunk's border and to the last token but one."""
        if row.ahead or row.number not in self._decoding:
            return 0
        left, chunk = row.prompt + row.request.max_new_tokens - row.total - 1, self.limits.chunk
        return min(left, self.limits.draft, left if chunk is None else chunk - 1 - row.computed % chunk)

    def accept(self, row: Row, tokens: int) -> None:
        """Of a row that is not planned ahead so many tokens of its draft stand; they and the one drawn behind them are delivered next."""
        if row.finish is not None:
            return
        self._held.remove(row.number)
        row.total += tokens
        if row.slot is not None:
            row.computed += tokens
            if row.computed % self.limits.page == 0:
                self._full.append(row)
            if not row.complete:
                self._decoding[row.number] = row

    def plan(self, now: float, budget: int, drafts: Mapping[int, int] | None = None) -> Plan:
        """The next step, which counts as launched.

        Args:
          now: seconds, as in `add`.
          budget: padded prompt tokens that may be computed beside a decode step, 1 or more; what is not used is saved for larger
            pieces. Where many prompts are read beside few rows that decode there are more of them; beside none, one full call is made.
          drafts: their lengths by the rows' numbers, at most `draft_room`.
        """
        self._expire(now)
        copies = self._admit()
        full, self._full = sorted(self._full, key=age), []
        for row in full:
            if row.number in self._decoding and not self._extend(row, row.computed + 1):
                self._preempt(row)
        drafts = {number: length for number, length in (drafts or {}).items() if self._grant(number, length)}
        chosen = self._choose(budget)  # may preempt rows that decode
        calls = (*self._decode(drafts), *map(self._prefill, chosen))
        plan = Plan(tuple(copies), tuple(self._slots.changes), calls, tuple(self._finished), tuple(self._preempted))
        self._slots.changes, self._finished, self._preempted = [], [], []
        for row in self._full:
            self._slots.seal(row)
        for group in chosen:
            for row, *_ in group:
                self._slots.seal(row)
                self._call_followers(row)
        return plan

    def check(self) -> None:
        """Assert what this file and those below it promise."""
        self._slots.check()
        running = sorted(self._slots.running.values(), key=age)
        ahead = [row for row in running if row.complete or row.number in self._held]
        assert sorted([*self._behind, *self._decoding.values(), *ahead], key=age) == running
        assert self._behind == [row for row in running if row.behind]
        following = [row for other in running for _, row in other.followers if row.finish is None]
        unread = [row for row in self.rows.values() if row.slot is None and (row.unread or row.complete)]
        assert sorted([*running, *self._waiting, *following, *unread], key=age) == sorted(self.rows.values(), key=age)
        assert self._waiting == sorted(self._waiting, key=age)
        for row in self.rows.values():
            assert row.cached <= row.computed < row.total <= row.prompt + row.request.max_new_tokens
            assert row.finish is None
            assert row.slot is not None or not (row.pages or row.computed or row.followers or row.draws)
        if self.idle:
            assert self._slots.available == self.limits.pages
            assert not self._deadlines
            assert not self._held

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            row = self.rows[self._deadlines[0][1]]
            self.finish(row, Finish.DEADLINE)
            self._finished.append(row.number)

    def _admit(self) -> list[Copy]:
        """Give slots to those that wait, the oldest first."""
        copies: list[Copy] = []
        while self._waiting and self._slots.idle and self._waiting[0] is not self._stuck:
            row = self._waiting[0]
            resume = self._slots.find(row)
            if self._follow(row, resume.length):
                self._waiting.pop(0)
            elif self._fits(row, resume):
                self._waiting.pop(0)
                insort(self._behind, row, key=age)
                if (copy := self._slots.enter(row, resume)) is not None:
                    copies.append(copy)
            else:
                self._stuck = row
        return copies

    def _follow(self, row: Row, ready: int) -> bool:
        """Wait until an older row has computed what both begin with, if half of what is to be computed is saved by that."""
        if not self.limits.reuse:
            return False
        best, leader, most = (ready + len(row.keys)) // 2, None, min(row.reusable, len(row.keys) - 1)
        for other in self._behind:
            if other.number < row.number and best < min(most, other.total) and other.keys[best] == row.keys[best]:
                shared = common(row.keys, other.keys, 0, min(most, other.total))
                if shared > max(best, other.computed):
                    best, leader = shared, other
        if leader is not None:
            leader.followers.append((best, row))
        return leader is not None

    def _fits(self, row: Row, resume: Resume) -> bool:
        """Whether there are pages for all its tokens, for all of the others' prompts, and one more for each row that runs."""
        if not self._slots.running:
            return True
        needed = self._slots.pages_needed(row, resume)
        promised = sum(self._slots.pages_of(other.total) - len(other.pages) for other in self._behind)
        return needed + promised + len(self._slots.running) <= self._slots.available

    def _choose(self, budget: int) -> list[list[Piece]]:
        """The prefill calls of a step, with pages for what they compute."""
        limits, sizes, most = self.limits, self.limits.piece_sizes, self.limits.piece_tokens
        beside = len(self._decoding) + len(self._held)
        if beside:
            budget = for_many(budget, len(self._behind), beside)
            sizes = [size for size in sizes if size <= self._credit.largest(budget)]
        pieces = [next_piece(row, limits.chunk, sizes) for row in self._behind]
        if beside:
            rows = _padded(min(len(pieces), limits.prefill_rows[-1]), limits.prefill_rows)
            self._credit.add(budget, rows * max((piece.size for piece in pieces), default=0))
        chosen: list[list[Piece]] = []
        while pieces:
            now, saved = (min(most, self._credit.tokens), min(most, self._credit.largest(budget))) if beside else (most, most)
            group = self._group(in_turn(pieces, oldest=self._oldest_leads), now, saved)
            if not group:
                break
            chosen.append(group)
            self._oldest_leads = not self._oldest_leads
            if not beside:
                break
            self._credit.tokens -= _padded(len(group), limits.prefill_rows) * group[0].size
            pieces = [piece for piece in pieces if piece not in group]
        groups = [[piece for piece in group if piece.row.slot is not None] for group in chosen]  # a later one may have preempted them
        return [group for group in groups if group]

    def _group(self, pieces: Sequence[Piece], now: int, saved: int) -> list[Piece]:
        """Those that make up the next call: the first that has pages, and what can go with it.

        Args:
          now: tokens that it may have.
          saved: tokens that it may have in some plans from now: nobody goes before, if more can go together then.
        """
        for leader in pieces:
            if leader.size > now:
                return []
            if leader.row.slot is not None and self._extend(leader.row, leader.row.computed + leader.length):
                break
        else:
            return []
        sizes = [size for size in self.limits.prefill_rows if size == 1 or size * leader.size <= saved]
        group = alike(leader, pieces)
        count, rows = fit(len(group), sizes)
        if rows * leader.size > now:
            return []
        group = group[:count]
        return [p for p in group if p.row.slot is not None and self._extend(p.row, p.row.computed + p.length)]

    def _extend(self, row: Row, tokens: int) -> bool:
        """Give a row pages for so many tokens, if need be by preempting the youngest; False if there are none from younger ones."""
        while not self._slots.extend(row, tokens):
            youngest = max(self._slots.running.values(), key=age)
            if youngest is row:
                return False
            self._preempt(youngest)
        return True

    def _grant(self, number: int, length: int) -> bool:
        """Whether there is room for a draft without taking a page from others."""
        row = self._decoding.get(number)
        if row is None or not length:
            return False
        assert length <= self.draft_room(row)
        return self._slots.extend(row, row.computed + 1 + length)

    def _decode(self, drafts: Mapping[int, int]) -> list[Call]:
        rows, most = list(self._decoding.values()), self.limits.decode_rows[-1]
        return [self._decode_call(rows[start : start + most], drafts) for start in range(0, len(rows), most)]

    def _decode_call(self, rows: list[Row], drafts: Mapping[int, int]) -> Call:
        parts, page = [], self.limits.page
        for row in rows:
            assert row.slot is not None
            length = 1 + drafts.get(row.number, 0)
            parts.append(Part(row.number, row.slot, row.computed, length, True, row.total - row.prompt))
            row.computed += 1
            row.total += 1
            if row.computed % page == 0:
                self._full.append(row)
            if row.complete or not row.ahead:
                del self._decoding[row.number]
                if not row.ahead:
                    self._held.add(row.number)
        drafted = bool(drafts) and any(row.number in drafts for row in rows)
        return Call("decode", tuple(parts), _padded(len(rows), self.limits.decode_rows), 1 + self.limits.draft if drafted else 1, False)

    def _prefill(self, group: list[Piece]) -> Call:
        parts, first, size = [], group[0].first, group[0].size
        for row, length, _, last in group:
            assert row.slot is not None
            parts.append(Part(row.number, row.slot, row.computed, length, last, row.total - row.prompt))
            row.computed += length
            if row.computed % self.limits.page == 0:
                self._full.append(row)
            if last:
                row.draws = True
                row.total += 1
                self._behind.remove(row)
                if not row.ahead:
                    self._held.add(row.number)
                elif not row.complete:
                    self._decoding[row.number] = row
        return Call("prefill", tuple(parts), _padded(len(group), self.limits.prefill_rows), size, first)

    def _call_followers(self, row: Row) -> None:
        """Those wait no longer for whom enough is computed; none does for a row that is up to date or has left."""
        still = [(tokens, other) for tokens, other in row.followers if row.slot is not None and row.behind and row.computed < tokens]
        for tokens, other in row.followers:
            if (tokens, other) not in still and other.finish is None:
                insort(self._waiting, other, key=age)
        row.followers = still

    def _preempt(self, row: Row) -> None:
        self._leave(row)
        row.cached = row.computed = row.sealed = 0
        row.draws = False
        self._preempted.append(row.number)
        if not row.unread and not row.complete:
            insort(self._waiting, row, key=age)

    def _leave(self, row: Row) -> None:
        """A row gives up its slot and pages."""
        if row.behind:
            self._behind.remove(row)
        else:
            self._decoding.pop(row.number, None)  # a complete one is not there
        self._slots.leave(row)
        self._stuck = None
        self._call_followers(row)


def _padded(count: int, sizes: Sequence[int]) -> int:
    return next(size for size in sizes if size >= count)
