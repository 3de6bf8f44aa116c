"""The engine: one loop that serves everyone.

Requests come and go; every turn of the loop plans what is computed next (`scheduler.py`), launches it (`steps.py`), and then
reads the tokens of the turn before: the devices never wait for the host. It runs in a thread of its own (`with engine:`), or
whenever somebody who waits for a token turns it.

Always: the state on the devices is what the scheduler believes, or `_broken` says that nobody knows it.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maverick_jax.errors import UserError
from maverick_jax.inference import pictures, steps
from maverick_jax.inference.admission import admitted, check_model
from maverick_jax.inference.scheduling.pace import Pace
from maverick_jax.inference.handle import Handle, Stopped
from maverick_jax.inference.not_finite import explain
from maverick_jax.inference.request import Finish, Request, Row
from maverick_jax.inference.room import Room, room_for
from maverick_jax.inference.sampling import RowSampling
from maverick_jax.inference.scheduling.plans import Call, Copy, Limits, Part
from maverick_jax.inference.scheduling.scheduler import Scheduler
from maverick_jax.inference.sizes import PIECE, PIECES, decode_rows, prefill_rows
from maverick_jax.model import Llama4
from maverick_jax.sharding import multihost


@dataclasses.dataclass(eq=False)
class _Served:
    """A request between `submit` and its end."""

    row: Row
    handle: Handle
    tiles: list[bytes]
    feature_T: np.ndarray | None  # which feature each token of the prompt takes; negative: none
    tokens: list[int]  # of the prompt, and the new ones

    @property
    def new(self) -> int:
        return len(self.tokens) - len(self.row.request.ids)


class _Launched:
    """Draws whose tokens nobody has read yet."""

    def __init__(self, parts: Sequence[Part], token_B: jax.Array):
        self.parts, self.token_B = parts, token_B
        token_B.copy_to_host_async()


class Engine:
    """Serves requests with a model, many at a time.

    Args:
      model: from `load`, or made by hand.
      slots: requests served at once; None: as many as the devices have memory for, at most 64.
      max_length: tokens of a request, prompt and answer together; None: the model's context, or what there is memory for.
      pages: of the cache of the layers that see the whole context, shared by all requests; None: as for slots.
      queue: requests that may wait; one more is refused.
      eight_bits: keep keys and values in 8 bits with a scale per head and slot, in half of the memory; attention is off by
        about 1 %, four times as much as with keys in bfloat16.
      reuse: whether a prompt that begins like an earlier one continues from there.

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
        reuse: bool = True,
        eight_bits: bool = False,
    ):
        check_model(model)
        self.model = model
        self.room: Room = room_for(model, slots=slots, max_length=max_length, pages=pages, eight_bits=eight_bits)
        geometry = self.room.geometry
        self.limits = Limits(
            slots=geometry.places,
            pages=geometry.pages,
            page=geometry.page,
            chunk=next((chunk for chunk in geometry.chunks if chunk), None),
            max_length=geometry.max_length,
            queue=queue,
            decode_rows=decode_rows(geometry.places),
            prefill_rows=prefill_rows(geometry.places),
            piece_sizes=PIECES,
            piece_tokens=PIECE,
            reuse=reuse,
        )
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._leaves: list[Any] = []
        self._restart()

    def __repr__(self) -> str:
        return f"Engine({len(self._served)} requests, {self.room})"

    # What callers do.

    def submit(self, request: Request) -> Handle:
        """Take a request. From any thread.

        Raises:
          UserError: it can never fit, the queue is full, or the engine has been stopped by an error.
        """
        with self._lock:
            self._refresh()
            config = self.model.config
            request = admitted(request, config, self.limits.max_length)
            tiles = pictures.digests(request.tiles)
            per_tile = config.vision.tokens_per_tile if config.vision else 0
            keys = pictures.keys(request.ids, config.image_token_index, tiles, per_tile)
            row = self._scheduler.add(request, keys, time.monotonic())
            handle = Handle(request, self._more, self.cancel)
            feature_T = (
                np.where(request.ids == config.image_token_index, np.cumsum(request.ids == config.image_token_index) - 1, -1)
                if tiles
                else None
            )
            self._served[row.number] = _Served(row, handle, tiles, feature_T, request.ids.tolist())
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
            return np.asarray(self._state.load_ME)

    @property
    def dropped(self) -> int:
        """Tokens that found no room at their expert: 0."""
        with self._lock:
            return int(self._state.dropped)

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
        thread = self._thread
        with self._lock:
            self._stopping, self._thread = True, None
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
        """One turn: plan and launch, then read what the turn before has drawn."""
        with self._lock:
            if self._broken:
                self._fail(Stopped("the engine was interrupted."), Finish.CANCELLED)
            self._broken = True  # until this turn is over: an interrupt may come anywhere
            launched = self._launch()
            before, self._launched = self._launched, launched
        read = [(draws.parts, np.asarray(draws.token_B)) for draws in before]
        with self._lock:
            for parts, token_B in read:
                self._deliver(parts, token_B.tolist())
            self._broken = False
            self._news.notify_all()

    def _launch(self) -> list[_Launched]:
        plan = self._scheduler.plan(time.monotonic(), self._pace.tokens)
        for number in plan.finished:
            served = self._served.get(number)
            if served is not None:  # a cancelled one has been told
                self._end(served, Finish.DEADLINE)
        for slot, column, page in plan.table_changes:
            self._table_SJ[slot, column] = page
        if plan.table_changes:
            self._table = steps.upload(self.model.constrain, self._table_SJ)
        for copy in plan.copies:
            self._copy(copy)
        self._pace.begin(plan)
        return [draws for call in plan.calls for draws in self._call(call)]

    def _copy(self, copy: Copy) -> None:
        places = [copy.source, copy.target] if copy.source is not None else [0, 0]
        for pages in copy.pages or ((0, 0),):
            self._state = steps.copy(self.room.geometry, self._state, np.array(places, np.int32), np.array(pages, np.int32))
            places = [0, 0]

    def _call(self, call: Call) -> list[_Launched]:
        places = self.room.geometry.places
        rows_BC = np.full((call.rows, len(steps.Call._fields)), (places, 0, 0, -1), np.int32)
        for i, part in enumerate(call.parts):
            rows_BC[i] = part.slot, part.start, part.length, part.step if part.samples else -1
        if call.kind == "decode":
            self._state, logits_BV = steps.decode(
                self._structure, self.room.geometry, self._leaves, self._state, self._table, self._token_S, rows_BC
            )
        else:
            x_BTD = self._embedded(call)
            self._state, logits_BV = steps.prefill(
                self._structure, self.room.geometry, call.first, self._leaves, self._state, self._table, x_BTD, rows_BC
            )
        drawn = []
        if any(part.samples for part in call.parts):
            self._token_S, token_B = steps.draw(self.model.constrain, logits_BV, self._token_S, self._settings_of(call), rows_BC)
            drawn.append(_Launched(call.parts, token_B))
        if self._blocks:
            jax.block_until_ready(self._state.dropped)
        return drawn

    def _settings_of(self, call: Call) -> RowSampling:
        """Of every place, changed where another request has moved in."""
        changed = False
        for part in call.parts:
            if part.samples and self._owner_S[part.slot] != part.row:
                self._owner_S[part.slot] = part.row
                self._settings_S.set(part.slot, self._served[part.row].row.request.sampling)
                changed = True
        if changed:
            self._settings = steps.upload(self.model.constrain, self._settings_S)
        return self._settings

    def _embedded(self, call: Call) -> jax.Array:
        """[B, T, D] of a prefill's pieces, their pictures' features among them."""
        ids_BT = np.zeros((call.rows, call.tokens), np.int32)
        for i, part in enumerate(call.parts):
            ids_BT[i, : part.length] = self._served[part.row].tokens[part.start : part.start + part.length]
        x_BTD = steps.embed(self._structure, self._leaves, ids_BT)
        for i, part in enumerate(call.parts):
            served = self._served[part.row]
            if served.feature_T is None:
                continue
            feature_t = served.feature_T[part.start : part.start + part.length]
            per_tile = self.model.config.vision.tokens_per_tile
            wanted = np.unique(feature_t[feature_t >= 0] // per_tile).tolist()
            for tile, features_PD in zip(wanted, self._features_of(served, wanted), strict=True):
                index_BT = np.full(ids_BT.shape, -1, np.int32)
                index_BT[i, : len(feature_t)] = np.where(feature_t // per_tile == tile, feature_t - tile * per_tile, -1)
                x_BTD = steps.place(self.model.constrain, x_BTD, features_PD, index_BT)
        return x_BTD

    def _features_of(self, served: _Served, tiles: list[int]) -> list[jax.Array]:
        return self._features.of([served.tiles[tile] for tile in tiles], served.row.request.tiles[tiles]) if tiles else []

    def _deliver(self, parts: Sequence[Part], tokens: list[int]) -> None:
        for part, token in zip(parts, tokens, strict=False):  # the call may have more rows than parts
            served = self._served.get(part.row)
            if served is None or not part.samples:
                continue
            handle, request = served.handle, served.row.request
            if token == steps.NOT_FINITE:
                self._scheduler.finish(served.row, Finish.ERROR)
                self._end(served, Finish.ERROR, UserError(self._explain(served)))
                continue
            self._scheduler.deliver(served.row, token)
            served.tokens.append(token)
            if token in request.stop_ids:
                self._scheduler.finish(served.row, Finish.STOP)
                self._end(served, Finish.STOP)
                continue
            handle.cached_tokens = served.row.cached
            handle.add(token)
            if served.new == request.max_new_tokens:
                self._scheduler.finish(served.row, Finish.LENGTH)
                self._end(served, Finish.LENGTH)

    def _end(self, served: _Served, why: Finish, error: Exception | None = None) -> None:
        del self._served[served.row.number]
        served.handle.end(why, error)

    def _fail(self, error: Exception, why: Finish) -> None:
        """End everyone, and begin with an empty cache."""
        for served in list(self._served.values()):
            self._end(served, why, error)
        self._restart()
        self._news.notify_all()

    def _explain(self, served: _Served) -> str:
        request, tokens = served.row.request, np.array(served.tokens, np.int32)
        features = None
        if request.tiles is not None:
            features = jnp.concatenate(self._features_of(served, list(range(len(request.tiles)))))
        index_T = np.zeros_like(tokens)
        if served.feature_T is not None:
            index_T[: len(request.ids)] = np.maximum(served.feature_T, 0)
        return f"the logits are not finite after {served.new} new tokens: {explain(self.model, tokens, index_T, features, request.tiles)}"

    # State.

    def _refresh(self) -> None:
        """Before a request is taken: is everything what it was?"""
        if self._broken and self._thread is None:  # a turn was interrupted
            self._fail(Stopped("the engine was interrupted."), Finish.CANCELLED)
        leaves, _ = jax.tree.flatten(self.model)
        if any(a is not b for a, b in zip(leaves, self._leaves, strict=True)):  # other weights: what was cached is of no use
            if self._served:
                raise UserError("the model's weights were replaced while requests are served: wait for their end.")
            self._restart()

    def _restart(self) -> None:
        """An empty cache, and nobody served."""
        model, geometry = self.model, self.room.geometry
        self._leaves, self._structure = jax.tree.flatten(model)
        self._scheduler = Scheduler(self.limits)
        self._served: dict[int, _Served] = {}
        self._launched: list[_Launched] = []
        self._pace = Pace(measured=multihost.process_count() == 1)
        self._state, self._token_S = steps.create(model.config.text, geometry, self.room.dtype, model.constrain)
        self._table_SJ = np.zeros((geometry.places, geometry.stretches), np.int32)
        self._table = steps.upload(model.constrain, self._table_SJ)
        self._settings_S = RowSampling.empty(geometry.places)
        self._settings = steps.upload(model.constrain, self._settings_S)
        self._owner_S: list[int | None] = [None] * geometry.places
        self._features = pictures.Features(lambda tiles: steps.encode(self._structure, self._leaves, tiles), steps.pick)
        # Simulated devices share the threads of one process: with several calls in flight, each may wait in another one's collective.
        devices = self._token_S.devices()
        self._blocks = len(devices) > 1 and next(iter(devices)).platform == "cpu"
        self._broken = self._stopping = False
