"""The engine: one loop that serves everyone.

Requests come and go; every turn of the loop plans what is computed next, launches it, and then reads the tokens of the turn before
(`serving.py`): the devices never wait for the host. It runs in a thread of its own (`with engine:`), or whenever somebody who waits
for a token turns it.

Always: the state on the devices is what the scheduler believes, or `_broken` says that nobody knows it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
from tqdm import tqdm

from maverick_jax.adapter import load_adapters
from maverick_jax.errors import UserError, first_line
from maverick_jax.inference import followers, pictures
from maverick_jax.inference.admission import admitted, check_model
from maverick_jax.inference.checks import Range, whole
from maverick_jax.inference.grammar import Grammars, Matcher
from maverick_jax.inference.handle import Handle, Stopped
from maverick_jax.inference.request import Admitted, Finish, Full, Request
from maverick_jax.inference.room import Room, platform_of, room_for
from maverick_jax.inference.runner import Launched, Observed
from maverick_jax.inference.sampling import NOT_FINITE
from maverick_jax.inference.scheduling.pace import FIXED, Pace
from maverick_jax.inference.scheduling.plans import Limits, shapes
from maverick_jax.inference.serving import Occupancy, Serving
from maverick_jax.inference.sizes import PIECE, call_rows, decode_rows, pieces
from maverick_jax.inference.speculate import Acceptance
from maverick_jax.model import Llama4
from maverick_jax.prompt import Tokenizer
from maverick_jax.sharding import multihost

QUEUE = Range(whole, 0, 2**31 - 1, "a whole number, 0 or more")
DRAFT = Range(whole, 0, 16, "a whole number between 0 (no drafts) and 16")
Result = TypeVar("Result")


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
      adapters: directories of LoRAs by the names that requests call them by, side by side on the devices; a request without a name has
        none of them.
      routed_experts: whether requests may ask which experts their tokens went to. A prefill's last layer computes all tokens then.
      paced: measure how much of a prompt may be read beside those who are decoding. Without it the same requests take the same calls,
        whatever time they take, and have the same results to the last bit.
      trace: a text stream that gets a line for everything the scheduler is told and plans, see `benchmarks/replay_trace.py`.

    In a run of several processes each makes the same engine, and either gives it the same requests in the same order (`run`), or
    leaves them to process 0 (`lead`, `follow`).

    Raises:
      UserError: no model, a number out of its range, more than there is memory for, an adapter that is none or for another model, or
        processes with other engines.
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
        adapters: Mapping[str, str | Path] | None = None,
        routed_experts: bool = False,
        paced: bool = True,
        trace: TextIO | None = None,
    ):
        check_model(model)
        self.model = model
        self._adapters = load_adapters(model, {} if adapters is None else adapters)
        sizes = {"slots": slots, "max_length": max_length, "pages": pages}
        self.room: Room = room_for(model, **sizes, eight_bits=eight_bits, routed=routed_experts)
        geometry = self.room.geometry
        chunk = next((chunk for chunk in geometry.chunks if chunk), None)
        self.limits = Limits(
            slots=geometry.places,
            pages=geometry.pages,
            page=geometry.page,
            chunk=chunk,
            max_length=geometry.max_length,
            queue=QUEUE.check("queue", queue),
            decode_rows=decode_rows(geometry.places, platform_of(model)),
            prefill_rows=call_rows(geometry.places),
            piece_sizes=pieces(min(chunk or PIECE, geometry.max_length)),
            piece_tokens=PIECE,
            draft=DRAFT.check("draft", draft),
            reuse=reuse,
        )
        followers.check_same(model, self.limits, self.room, self._adapters)
        self._paced, self._trace = paced, trace
        self._turn = threading.Lock()  # held for a whole turn, and taken before the other one
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._leader: followers.Leader | None = None
        self._listeners: tuple[Callable[[], object], ...] = ()
        self._restart()

    def __repr__(self) -> str:
        return f"Engine({len(self._serving.by_number)} requests, {self.room})"

    # What callers do.

    def submit(self, request: Request) -> Handle:
        """Take a request. From any thread.

        Raises:
          UserError: it can never fit, the queue is full, or the engine has been stopped by an error.
        """
        checked = self._admitted(request)
        matcher = self._matcher(checked)  # may take seconds: nobody waits for it
        tiles = pictures.digests(checked.tiles)
        with self._lock:
            self._refresh()
            told = followers.as_json(checked) if self._leader else None
            handle, now = Handle(checked, self._more, self.cancel), self._now(checked.deadline is not None)
            self._serving.add(checked, handle, matcher, tiles, now)
            if self._leader:
                self._leader.note(add=told, now=now)
            self._tell()
            return handle

    def run(self, requests: Iterable[Request]) -> list[Handle]:
        """Serve requests to their end, in this thread if the engine has none of its own.

        Raises:
          UserError: as `submit`; none of them is served on.
        """
        handles: list[Handle] = []
        try:
            for request in requests:
                while (handle := self._submitted(request, handles)) is None:
                    pass
                handles.append(handle)
            for handle in handles:
                while not handle.finish:
                    self._more(handle, len(handle.tokens))
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return handles

    def _submitted(self, request: Request, earlier: Iterable[Handle]) -> Handle | None:
        """None if there was no room, and one of the earlier ones has gone on meanwhile."""
        try:
            return self.submit(request)
        except Full:
            running = next((handle for handle in earlier if not handle.finish), None)
            if running is None:
                raise
            self._more(running, len(running.tokens))
            return None

    def cancel(self, handle: Handle) -> None:
        """End a request now; its place and pages are free for others at once."""
        with self._lock:
            for number, served in self._serving.by_number.items():
                if served.handle is handle:
                    return self._cancel(number)

    def listen(self, told: Callable[[], object]) -> None:
        """Have a function called, from any thread, whenever a handle may have news; it must return at once."""
        self._listeners += (told,)

    def lead(self, serve: Callable[[], Result]) -> Result:
        """On process 0 of several: while it is in `serve` it alone is asked, and the others, which `follow`, compute with it."""
        if multihost.process_count() == 1:
            return serve()
        try:
            with followers.leading() as self._leader:
                return serve()
        finally:
            self._leader = None

    def follow(self) -> None:
        """On the other processes: compute what process 0 serves, until it is through."""
        launched: list[Launched | Observed] = []
        with self._lock:
            for event in followers.told():
                match event:
                    case {"add": request, "now": now}:
                        asked = self._admitted(followers.from_json(request))
                        handle, tiles = Handle(asked, self._more, self.cancel), pictures.digests(asked.tiles)
                        self._serving.add(asked, handle, self._matcher(asked), tiles, now)
                    case {"cancel": number}:
                        self._cancel(number)
                    case {"now": now, "budget": budget}:
                        launched = self._launch(now, budget)
                    case {"deliver": True}:
                        self._serving.deliver([one for some in launched for one in some.read()])
                    case {"restart": True}:
                        self._restart()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of those that requests may have."""
        return self._adapters.names

    @property
    def routed_experts(self) -> bool:
        """Whether it tells experts."""
        return self.room.geometry.routed

    @property
    def drafted(self) -> Acceptance:
        """What the drafts were good for."""
        return self._serving.drafted

    @property
    def occupancy(self) -> Occupancy:
        """How busy it is."""
        with self._lock:
            return self._serving.occupancy

    @property
    def load_ME(self) -> np.ndarray:
        """[M, E] tokens that each expert of each mixture has computed; of a prefill the last layer computes one token per row."""
        with self._lock:
            return np.asarray(self._serving.runner.state.load_ME)

    @property
    def dropped(self) -> int:
        """Tokens that found no room at their expert: 0."""
        with self._lock:
            return int(self._serving.runner.state.dropped)

    def warm_up(self, *, extras: bool = True, progress: bool = True) -> None:
        """Compile and run every program there is, so that no request waits for one; call it before the first of them.

        Args:
          extras: those for penalties, biases, grammars and log-probabilities too.
          progress: show a bar at a terminal.
        """
        with self._turn, self._lock:
            assert not self._serving.by_number
            work = self._serving.runner.warm_up(shapes(self.limits), extras=extras)
            for run in tqdm(work, desc="compiling", unit="program", disable=None if progress else True):
                run()
            self._restart()

    # The loop.

    def __enter__(self) -> Engine:
        if not self._decides:
            raise UserError("of several processes only process 0 has an engine with a thread, inside of `lead`.")
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
            self._tell()
        if thread is not None:
            thread.join()
        with self._turn, self._lock:
            self._fail(Stopped("the engine was closed."), Finish.CANCELLED)

    def _loop(self) -> None:
        while True:
            with self._lock:
                while not self._stopping and not self._serving.busy:
                    self._news.wait()
                if self._stopping:
                    return
            try:
                self.step()
            except BaseException as error:  # a panic of Rust is no Exception
                with self._turn, self._lock:
                    if self._leader:
                        self._leader.fail(error)
                    self._fail(Stopped(f"the engine stopped: {first_line(error)}"), Finish.ERROR)

    def _more(self, handle: Handle, seen: int) -> None:
        """Return when there are more tokens than were seen, or the request has ended."""
        with self._lock:
            while self._thread is not None:
                if handle.finish or len(handle.tokens) > seen:
                    return
                self._news.wait()
        self.step()

    def step(self) -> None:
        """One turn: plan and launch, then read what the turn before has drawn, and this one too where drafts are made of it."""
        with self._turn:
            with self._lock:
                if self._broken:
                    self._fail(Stopped("the engine was interrupted."), Finish.CANCELLED)
                if self._serving.closed:
                    return
                self._broken = True  # until this turn is over: an interrupt may come anywhere
                budget = self._pace.tokens if self._paced and self._decides else FIXED
                launched = self._launch(self._now(self._serving.scheduler.has_deadlines), budget)
            drawn = [one for some in launched for one in some.read()]
            with self._lock:
                if self._leader:
                    self._leader.note(deliver=True)
                    if self._serving.draws_later or any(NOT_FINITE in (tokens or ()) for _, tokens, _ in drawn):
                        self._leader.tell()  # all draw, or compute why
                self._serving.deliver(drawn)
                self._broken = False
                self._tell()

    def _tell(self) -> None:
        """There is news."""
        self._news.notify_all()
        for told in self._listeners:
            told()

    def _launch(self, now: float, budget: int) -> list[Launched | Observed]:
        if self._leader:
            self._leader.note(now=now, budget=budget)
            self._leader.tell()
        began = time.perf_counter()
        plan, launched = self._serving.launch(now, budget)
        self._pace.begin(plan, began)
        return launched

    def _cancel(self, number: int) -> None:
        if self._leader:
            self._leader.note(cancel=number)
        self._serving.cancel(number)
        self._tell()

    def _fail(self, error: Exception, why: Finish) -> None:
        """End everyone, and begin with an empty cache."""
        self._serving.close(error, why)
        self._tell()
        with contextlib.suppress(Exception):  # the next request tries again, and is told
            self._restart()

    def _refresh(self) -> None:
        """Before a request is taken: is everything what it was?"""
        if self._leader and self._leader.failed:
            raise Stopped("a turn has failed, and this run ends.")
        if not self._turn.acquire(blocking=False):  # whoever makes the turn looks after it
            if self._serving.closed:
                raise Stopped("the engine begins anew: send the request again.")
            return
        try:
            if self._broken:
                self._fail(Stopped("the engine was interrupted."), Finish.CANCELLED)
            stale = not self._serving.by_number and not self._serving.closed and not self._serving.runner.is_of(self.model)
            if stale or self._serving.closed:  # what was computed by other weights is of no use
                self._restart()
        finally:
            self._turn.release()

    def _restart(self) -> None:
        """An empty cache, and nobody served."""
        if self._leader:
            self._leader.note(restart=True)
        if (old := vars(self).get("_serving")) is not None:
            old.close(Stopped("the engine began anew."), Finish.CANCELLED)  # its cache goes first: there is memory for one
        self._broken = False
        self._serving = Serving(self.model, self.room, self.limits, self._adapters, self._trace)
        self._pace = Pace()

    @property
    def _decides(self) -> bool:
        """Whether no other process must come to the same by itself."""
        return self._leader is not None or multihost.process_count() == 1

    def _now(self, matters: bool) -> float:
        """Seconds; where all processes have the same requests those of process 0, and 0 while there is no deadline."""
        if self._decides:
            return time.monotonic()
        return multihost.exchange(time.monotonic())[0] if matters else 0.0

    def _admitted(self, request: Any) -> Admitted:
        known = {"routed": self.routed_experts, "adapters": self.adapters}
        return admitted(request, self.model.config, self.limits.max_length, **known)

    def _matcher(self, request: Admitted) -> Matcher | None:
        return None if request.grammar is None else self.grammars.matcher(request.grammar)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """The forms of answers, compiled for this model."""
        if self.model.directory is None:
            raise UserError(
                "a grammar needs the tokenizer, and this model was not loaded from a directory: open it with maverick_jax.load."
            )
        config = self.model.config
        return Grammars(Tokenizer.from_directory(self.model.directory), vocabulary=config.text.vocab_size, end_ids=config.eos_token_id)
