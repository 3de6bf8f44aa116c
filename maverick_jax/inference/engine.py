"""The engine: one loop that serves everyone.

Requests come and go; every turn of the loop plans what is computed next (`scheduler.py`), launches it (`steps.py`), and then
reads the tokens of the turn before: the devices never wait for the host. It runs in a thread of its own (`with engine:`), or
whenever somebody who waits for a token turns it.

Always: the state on the devices is what the scheduler believes, or `_broken` says that nobody knows it.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Iterable
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from maverick_jax.errors import UserError
from maverick_jax.inference import pictures
from maverick_jax.inference.admission import admitted, check_model
from maverick_jax.inference.checks import Range, whole
from maverick_jax.inference.grammar import Grammars
from maverick_jax.inference.handle import Handle, Stopped
from maverick_jax.inference.not_finite import explain
from maverick_jax.inference.request import Finish, Request
from maverick_jax.inference.room import Room, room_for
from maverick_jax.inference.runner import Content, Launched, Runner
from maverick_jax.inference.sampling import NOT_FINITE, NOTHING_LEFT, Sampled
from maverick_jax.inference.scheduling.pace import Pace
from maverick_jax.inference.scheduling.plans import Limits, Part, shapes
from maverick_jax.inference.scheduling.scheduler import Scheduler
from maverick_jax.inference.scheduling.trace import Recording
from maverick_jax.inference.sizes import PIECE, pieces, powers_of_two, prefill_rows
from maverick_jax.inference.speculate import Acceptance, Drafts, PromptLookup
from maverick_jax.model import Llama4
from maverick_jax.prompt import Tokenizer
from maverick_jax.sharding import multihost

QUEUE = Range(whole, 0, 2**31 - 1, "a whole number, 0 or more")
DRAFT = Range(whole, 0, 16, "a whole number between 0 (no drafts) and 16")


@dataclasses.dataclass(eq=False, kw_only=True)
class _Served(Content):
    """A request between `submit` and its end."""

    handle: Handle
    drafts: Drafts | None


class Engine:
    """Serves requests with a model, many at a time.

    Args:
      model: from `load`, or made by hand.
      slots: requests served at once; None: as many as the devices have memory for, at most 64.
      max_length: tokens of a request, prompt and answer together; None: the model's context, or what there is memory for.
      pages: of the cache of the layers that see the whole context, shared by all requests; None: as for slots.
      queue: requests that may wait; one more is refused.
      draft: longest draft of a step, in tokens: what the prompt or the answer itself had behind the same words. The tokens are the same
        with and without. 0: none.
      eight_bits: keep keys and values in 8 bits with a scale per head and slot, in half of the memory; attention is off by
        about 1 %, four times as much as with keys in bfloat16.
      reuse: whether a prompt that begins like an earlier one continues from there.
      trace: a text stream that gets a line for everything the scheduler is told and plans, see `benchmarks/replay_trace.py`.

    Attributes:
      drafted: what the drafts were good for.

    Raises:
      UserError: no model, a number out of its range, or more than there is memory for.
    """

    def __init__(
        self,
        model: Llama4,
        *,
        slots: int | None = None,
        max_length: int | None = None,
        pages: int | None = None,
        queue: int = 1024,
        draft: int = 0,
        eight_bits: bool = False,
        reuse: bool = True,
        trace: TextIO | None = None,
    ):
        check_model(model)
        self.model = model
        self.room: Room = room_for(model, slots=slots, max_length=max_length, pages=pages, eight_bits=eight_bits)
        geometry = self.room.geometry
        chunk = next((chunk for chunk in geometry.chunks if chunk), None)
        self.limits = Limits(
            slots=geometry.places,
            pages=geometry.pages,
            page=geometry.page,
            chunk=chunk,
            max_length=geometry.max_length,
            queue=QUEUE.check("queue", queue),
            decode_rows=powers_of_two(geometry.places),
            prefill_rows=prefill_rows(geometry.places),
            piece_sizes=pieces(min(chunk or PIECE, geometry.max_length)),
            piece_tokens=PIECE,
            draft=DRAFT.check("draft", draft),
            reuse=reuse,
        )
        self._trace = trace
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._restart()

    def __repr__(self) -> str:
        return f"Engine({len(self._served)} requests, {self.room})"

    # What callers do.

    def submit(self, request: Request) -> Handle:
        """Take a request. From any thread.

        Raises:
          UserError: it can never fit, the queue is full, or the engine has been stopped by an error.
        """
        config, limits = self.model.config, self.limits
        checked = admitted(request, config, limits.max_length)
        matcher = None if checked.grammar is None else self._grammars.matcher(checked.grammar)  # may take seconds: nobody waits for it
        tiles = pictures.digests(checked.tiles)
        with self._lock:
            self._refresh()
            per_tile = config.vision.tokens_per_tile if config.vision else 0
            keys = pictures.keys(checked.ids, config.image_token_index, tiles, per_tile)
            # A mask and a draft are made of the newest token: such a row waits until it is read.
            row = self._scheduler.add(checked, keys, time.monotonic(), ahead=matcher is None and not limits.draft)
            handle = Handle(checked, self._more, self.cancel)
            is_patch = checked.ids == config.image_token_index
            feature_T = np.where(is_patch, np.cumsum(is_patch) - 1, -1) if tiles else None
            drafts = PromptLookup(checked.ids.tolist(), draft=limits.draft) if limits.draft else None
            self._served[row.number] = _Served(
                row=row, request=checked, tokens=checked.ids.tolist(), tiles=tiles, feature_T=feature_T, matcher=matcher,
                handle=handle, drafts=drafts,
            )  # fmt: skip
            self._news.notify_all()
            return handle

    def run(self, requests: Iterable[Request]) -> list[Handle]:
        """Serve requests to their end, in this thread if the engine has none of its own."""
        handles = [self.submit(request) for request in requests]
        for handle in handles:
            while not handle.finish:
                self._more(handle, len(handle.tokens))
        return handles

    def cancel(self, handle: Handle) -> None:
        """End a request now; its place and pages are free for others at once."""
        with self._lock:
            for served in self._served.values():
                if served.handle is handle:
                    self._scheduler.cancel(served.row)
                    self._end(served, Finish.CANCELLED)
                    return

    @property
    def load_ME(self) -> np.ndarray:
        """[M, E] tokens that each expert of each mixture has computed; of a prefill the last layer computes one token per row."""
        with self._lock:
            return np.asarray(self._runner.state.load_ME)

    @property
    def dropped(self) -> int:
        """Tokens that found no room at their expert: 0."""
        with self._lock:
            return int(self._runner.state.dropped)

    def warm_up(self, *, extras: bool = True, progress: bool = True) -> None:
        """Compile and run every program there is, so that no request waits for one; call it before the first of them.

        Args:
          extras: those for penalties, biases, grammars and log-probabilities too.
          progress: show a bar at a terminal.
        """
        with self._lock:
            assert not self._served
            work = self._runner.warm_up(shapes(self.limits), extras=extras)
            for run in tqdm(work, desc="compiling", unit="program", disable=None if progress else True):
                run()
            self._restart()

    # The loop.

    def __enter__(self) -> Engine:
        with self._lock:
            assert self._thread is None
            self._stopping = False
            self._thread = threading.Thread(target=self._loop, name="maverick engine", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, and every request that is not done."""
        with self._lock:
            thread, self._thread, self._stopping = self._thread, None, True
            self._news.notify_all()
        if thread is not None:
            thread.join()
        with self._lock:
            self._fail(Stopped("the engine was closed."), Finish.CANCELLED)

    def _loop(self) -> None:
        while True:
            with self._lock:
                while not self._stopping and not self._busy:
                    self._news.wait()
                if self._stopping:
                    return
            try:
                self.step()
            except Exception as error:
                with self._lock:
                    self._fail(Stopped(f"the engine stopped: {error}"), Finish.ERROR)

    @property
    def _busy(self) -> bool:
        return bool(self._launched) or not self._scheduler.idle

    def _more(self, handle: Handle, seen: int) -> None:
        """Return when there are more tokens than were seen, or the request has ended."""
        with self._lock:
            while self._thread is not None:
                if handle.finish or len(handle.tokens) > seen:
                    return
                self._news.wait()
        self.step()

    def step(self) -> None:
        """One turn: plan and launch, then read what the turn before has drawn, and this one too if somebody's next step depends on it."""
        with self._lock:
            if self._broken:
                self._fail(Stopped("the engine was interrupted."), Finish.CANCELLED)
            self._broken = True  # until this turn is over: an interrupt may come anywhere
            before, self._launched = self._launched, self._launch()
            if not all(self._served[part.row].row.ahead for launched in self._launched for part in launched.parts):
                before, self._launched = [*before, *self._launched], []
        drawn = [one for launched in before for one in launched.read()]
        with self._lock:
            for part, tokens, sampled in drawn:
                self._deliver(part, tokens, sampled)
            self._broken = False
            self._news.notify_all()

    def _launch(self) -> list[Launched]:
        lengths = {}
        for number, served in self._served.items() if self.limits.draft else ():
            assert served.drafts is not None
            served.draft = served.drafts.propose(self._scheduler.draft_room(served.row))
            if served.matcher is not None:
                served.draft = served.matcher.allowed(served.draft)
            if served.draft:
                lengths[number] = len(served.draft)
        plan = self._scheduler.plan(time.monotonic(), self._pace.tokens, lengths)
        for number in plan.finished:
            if number in self._served:  # a cancelled one has been told
                self._end(self._served[number], Finish.DEADLINE)
        self._pace.begin(plan)
        return self._runner.run(plan, self._served)

    def _deliver(self, part: Part, tokens: list[int], sampled: Sampled) -> None:
        served = self._served.get(part.row)
        if served is None:
            return
        row = served.row
        if part.length > 1 and served.draft:
            self.drafted.count(len(served.draft[: part.length - 1]), len(tokens) - 1)
        if not row.ahead:
            self._scheduler.accept(row, len(tokens) - 1)
        for place, token in enumerate(tokens):
            ended = self._token(served, token, place, sampled)
            if ended is not None:
                if row.finish is None:
                    self._scheduler.finish(row, ended)
                return

    def _token(self, served: _Served, token: int, place: int, sampled: Sampled) -> Finish | None:
        """One token of a request; why that ends it, if it does."""
        row, handle, request = served.row, served.handle, served.request
        if token == NOT_FINITE:
            return self._end(served, Finish.ERROR, UserError(self._explain(served)))
        if token == NOTHING_LEFT:
            return self._end(served, Finish.ERROR, UserError("no token may come: the grammar, the bias and min_tokens forbid all of them."))
        self._scheduler.deliver(row, token)
        served.tokens.append(token)
        if served.drafts is not None:
            served.drafts.extend([token])
        if served.matcher is not None:
            try:
                served.matcher.accept(token)
            except UserError as error:
                return self._end(served, Finish.ERROR, error)
        ends = request.stop_ids if served.matcher is None else request.stop_ids | set(self._grammars.end_ids)
        if token in ends:
            return self._end(served, Finish.STOP)
        if not handle.tokens:
            handle.cached_tokens = row.cached  # what it computes again after a preemption is nobody's gain
        handle.add(token, sampled, place)
        if served.matcher is not None and served.matcher.finished:
            return self._end(served, Finish.STOP)
        return self._end(served, Finish.LENGTH) if len(served.new) == request.max_new_tokens else None

    def _end(self, served: _Served, why: Finish, error: Exception | None = None) -> Finish:
        del self._served[served.row.number]
        served.handle.end(why, error)
        return why

    def _fail(self, error: Exception, why: Finish) -> None:
        """End everyone, and begin with an empty cache."""
        for served in list(self._served.values()):
            self._end(served, why, error)
        self._restart()
        self._news.notify_all()

    def _explain(self, served: _Served) -> str:
        request, tokens = served.request, np.array(served.tokens, np.int32)
        features = None if request.tiles is None else jnp.concatenate(self._runner.features_of(served, range(len(request.tiles))))
        index_T = np.zeros_like(tokens)
        if served.feature_T is not None:
            index_T[: len(request.ids)] = np.maximum(served.feature_T, 0)
        why = explain(self.model, tokens, index_T, features, request.tiles)
        return f"the logits are not finite after {len(served.new)} new tokens: {why}"

    @functools.cached_property
    def _grammars(self) -> Grammars:
        if self.model.directory is None:
            raise UserError(
                "a grammar needs the tokenizer, and this model was not loaded from a directory: open it with maverick_jax.load."
            )
        config = self.model.config
        return Grammars(Tokenizer.from_directory(self.model.directory), vocabulary=config.text.vocab_size, end_ids=config.eos_token_id)

    def _refresh(self) -> None:
        """Before a request is taken: is everything what it was?"""
        if self._broken and self._thread is None:  # a turn was interrupted
            self._fail(Stopped("the engine was interrupted."), Finish.CANCELLED)
        if self._served:
            return
        leaves = jax.tree.leaves(self.model)
        if any(a is not b for a, b in zip(leaves, self._runner.leaves, strict=True)):
            self._restart()  # what was computed by other weights is of no use

    def _restart(self) -> None:
        """An empty cache, and nobody served."""
        self._scheduler = Scheduler(self.limits) if self._trace is None else Recording(self.limits, self._trace)
        self._runner = Runner(self.model, self.room)
        self._served: dict[int, _Served] = {}
        self._launched: list[Launched] = []
        self._pace = Pace(measured=multihost.process_count() == 1)
        self.drafted = Acceptance()
        self._broken = False
