"""The requests that an engine serves: what a turn of its loop launches for them, and what comes of it.

Always: the state on the devices is what the scheduler believes. Nothing here waits but for a device, and one thread at a time may call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TextIO

import jax.numpy as jnp
import numpy as np

from maverick_jax.errors import UserError, first_line
from maverick_jax.inference import pictures
from maverick_jax.inference.grammar import Matcher
from maverick_jax.inference.handle import Handle
from maverick_jax.inference.not_finite import explain
from maverick_jax.inference.request import Admitted, Finish, Row
from maverick_jax.inference.room import Room
from maverick_jax.inference.runner import Content, Forwarded, Launched, Observed, Runner, Traits
from maverick_jax.inference.sampling import NOT_FINITE, NOTHING_LEFT, Sampled
from maverick_jax.inference.scheduling.plans import Limits, Part, Plan
from maverick_jax.inference.scheduling.scheduler import Scheduler
from maverick_jax.inference.scheduling.trace import Recording
from maverick_jax.inference.speculate import Acceptance, Drafts, PromptLookup
from maverick_jax.model import Llama4
from maverick_jax.model.named_adapters import NamedAdapters

Drawn = Sequence[tuple[Part, list[int], Sampled | None] | tuple[Part, None, Traits]]  # see `Launched.read`, `Observed.read`


@dataclasses.dataclass(eq=False, kw_only=True)
class Served(Content):
    """A request between its arrival and its end."""

    handle: Handle
    drafts: Drafts | None


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """How busy an engine is.

    Attributes:
      running, waiting: requests with a slot, and without.
      pages_used: share of the pages that running requests hold.
      preempted: times that a request lost its place to an older one.
      drafted: what drafts were good for.
    """

    running: int
    waiting: int
    pages_used: float
    preempted: int
    drafted: Acceptance


class Serving:
    """Requests from their arrival to their end, with an empty cache to begin with.

    Attributes:
      by_number: those that have not ended, by the number of their row.
      drafted: what the drafts were good for.
      preempted: times that a request lost its place to an older one.
      closed: it serves no more.
    """

    def __init__(self, model: Llama4, room: Room, limits: Limits, adapters: NamedAdapters, trace: TextIO | None = None):
        self.model, self.limits, self.adapters = model, limits, adapters
        self.scheduler = Scheduler(limits) if trace is None else Recording(limits, trace)
        self.runner = Runner(model, room, adapters)
        self.by_number: dict[int, Served] = {}
        self.drafted = Acceptance()
        self.preempted = 0
        self.closed = False
        self._launched: list[Launched | Observed] = []  # and not yet read
        self._undrawn: list[Forwarded] = []  # until the tokens are read that their masks are made of

    @property
    def busy(self) -> bool:
        return not self.closed and (bool(self._launched) or not self.scheduler.idle)

    @property
    def occupancy(self) -> Occupancy:
        running = sum(served.row.slot is not None for served in self.by_number.values())
        used = 1 - self.scheduler.available_pages / max(self.limits.pages, 1)
        return Occupancy(running, len(self.by_number) - running, used, self.preempted, dataclasses.replace(self.drafted))

    def add(self, request: Admitted, handle: Handle, matcher: Matcher | None, tiles: list[bytes], now: float) -> Row:
        """Take a request in; `tiles`: a digest of each.

        Raises:
          UserError: it can never fit, or the queue is full.
        """
        config, longest = self.model.config, self.limits.draft
        per_tile = config.vision.tokens_per_tile if config.vision else 0
        adapter = self.adapters.number(request.adapter)
        keys = pictures.keys(request.ids, config.image_token_index, tiles, per_tile, adapter)
        ahead = not longest  # a draft is made of the newest token: the row waits for it
        row = self.scheduler.add(request, keys, now, ahead=ahead, reusable=request.reusable)
        is_patch, tokens = request.ids == config.image_token_index, request.ids.tolist()
        feature_T = np.where(is_patch, np.cumsum(is_patch) - 1, -1) if tiles else None
        drafts = PromptLookup(tokens, draft=longest) if longest else None
        self.by_number[row.number] = Served(
            row=row,
            request=request,
            tokens=tokens,
            tiles=tiles,
            feature_T=feature_T,
            matcher=matcher,
            adapter=adapter,
            handle=handle,
            drafts=drafts,
        )
        return row

    def cancel(self, number: int) -> None:
        served = self.by_number[number]
        self.scheduler.cancel(served.row)
        self._end(served, Finish.CANCELLED)

    def launch(self, now: float, budget: int) -> tuple[Plan, list[Launched | Observed]]:
        """Plan a turn and launch it, with so many tokens of prefill beside a decode step. What is to be read next.

        Draws that need a mask are launched by `deliver`, which is to follow.
        """
        plan = self.scheduler.plan(now, budget, self._propose())
        for number in plan.finished:
            if number in self.by_number:  # a cancelled one has been told
                self._end(self.by_number[number], Finish.DEADLINE)
        self.preempted += len(plan.preempted)
        for part in (part for call in plan.calls if call.kind == "prefill" for part in call.parts):
            self.by_number[part.row].handle.begin()
        before, self._launched = self._launched, []
        for forwarded in self.runner.forward(plan, self.by_number):
            if forwarded.scores is not None or forwarded.expert_BTM is not None:
                self._launched.append(Observed(forwarded))
            rows = [self.by_number[part.row] for part in forwarded.drawing]
            if any(served.matcher is not None and served.row.ahead for served in rows):
                self._undrawn.append(forwarded)
            elif rows:
                self._launched.append(self.runner.draw(forwarded, self.by_number))
        if self.limits.draft:
            before, self._launched = [*before, *self._launched], []  # everybody's next step depends on this one's tokens
        return plan, before

    @property
    def draws_later(self) -> bool:
        """Whether `deliver` will launch something."""
        return bool(self._undrawn)

    def deliver(self, drawn: Drawn) -> None:
        """What was drawn, to those who asked for it; then their masks can be made, and the draws launched that wait for them."""
        for part, tokens, sampled in drawn:
            if (served := self.by_number.get(part.row)) is None:
                continue
            if isinstance(sampled, Traits):
                served.handle.observe(part.start, *sampled)
            elif tokens is not None:
                self._deliver(served, part, tokens, sampled)
        undrawn, self._undrawn = self._undrawn, []
        self._launched += [self.runner.draw(forwarded, self.by_number) for forwarded in undrawn]

    def close(self, error: Exception, why: Finish) -> None:
        """End everyone and give the cache back. Nothing else can be done with this any more."""
        self.closed = True
        for served in list(self.by_number.values()):
            self._end(served, why, error)
        self._launched, self._undrawn = [], []
        vars(self).pop("runner", None)

    def _propose(self) -> dict[int, int]:
        """The lengths of the drafts that there are, by the numbers of their rows."""
        lengths = {}
        for number, served in self.by_number.items() if self.limits.draft else ():
            assert served.drafts is not None
            served.draft = served.drafts.propose(self.scheduler.draft_room(served.row))
            if served.matcher is not None:
                served.draft = served.matcher.allowed(served.draft)
            if served.draft:
                lengths[number] = len(served.draft)
        return lengths

    def _deliver(self, served: Served, part: Part, tokens: list[int], sampled: Sampled | None) -> None:
        row = served.row
        if part.length > 1 and served.draft:
            self.drafted.count(len(served.draft[: part.length - 1]), len(tokens) - 1)
        if not row.ahead:
            self.scheduler.accept(row, len(tokens) - 1)
        for place, token in enumerate(tokens):
            ended = self._token(served, token, place, sampled)
            if ended is not None:
                if row.finish is None:
                    self.scheduler.finish(row, ended)
                return

    def _token(self, served: Served, token: int, place: int, sampled: Sampled | None) -> Finish | None:
        """One token of a request; why that ends it, if it does."""
        row, handle, request, matcher = served.row, served.handle, served.request, served.matcher
        if token == NOT_FINITE:
            return self._end(served, Finish.ERROR, UserError(self._explain(served)))
        if token == NOTHING_LEFT:
            return self._end(served, Finish.ERROR, UserError("no token may come: the grammar, the bias and min_tokens forbid all of them."))
        self.scheduler.deliver(row, token)
        served.tokens.append(token)
        if served.drafts is not None:
            served.drafts.extend([token])
        if matcher is not None:
            try:
                matcher.accept(token)
            except UserError as error:
                return self._end(served, Finish.ERROR, error)
        if not handle.tokens:
            handle.cached_tokens = row.cached  # what it computes again after a preemption is nobody's gain
        if token in request.stop_ids or (matcher is not None and token in matcher.grammars.end_ids):
            handle.stop(token, sampled, place)
            return self._end(served, Finish.STOP)
        handle.add(token, sampled, place)
        if matcher is not None and matcher.finished:
            return self._end(served, Finish.STOP)
        return self._end(served, Finish.LENGTH) if len(served.new) == request.max_new_tokens else None

    def _end(self, served: Served, why: Finish, error: Exception | None = None) -> Finish:
        del self.by_number[served.row.number]
        served.handle.end(why, error)
        return why

    def _explain(self, served: Served) -> str:
        request, tokens = served.request, np.array(served.tokens, np.int32)
        features = (
            None
            if request.tiles is None
            else jnp.concatenate(self.runner.features_of([(served, tile) for tile in range(len(request.tiles))]))
        )
        index_T = np.zeros_like(tokens)
        if served.feature_T is not None:
            index_T[: len(request.ids)] = np.maximum(served.feature_T, 0)
        try:
            why = explain(self.adapters.alone(self.model, request.adapter), tokens, index_T, features, request.tiles)
        except Exception as error:  # it computes the whole row once more, and memory may not be there
            why = f"what begins it cannot be told ({first_line(error)})."
        return f"the logits are not finite after {len(served.new)} new tokens: {why}"
