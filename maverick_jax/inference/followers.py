"""An engine in several processes: process 0 decides what is served, and tells the others before each turn.

They do what it did, in its order: take a request or end one, read what was drawn, plan and launch a turn at its time. What follows
from these, a plan above all, each makes for itself, and it is the same.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from maverick_jax.errors import UserError
from maverick_jax.inference.grammar import Grammar
from maverick_jax.inference.request import Admitted, Request
from maverick_jax.inference.room import Room
from maverick_jax.inference.sampling import Sampling
from maverick_jax.inference.scheduling.plans import Limits, shapes
from maverick_jax.model import Llama4
from maverick_jax.model.named_adapters import NamedAdapters
from maverick_jax.sharding import multihost
from maverick_jax.sharding.connection import MESSAGE_BYTES

PORTION = 64  # events of a message
MOST_PIXELS = MESSAGE_BYTES // 2  # bytes of a request, a third more as text


class Leader:
    """Process 0's part: what it does is told with its next turn, which waits for the others to have launched theirs."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self.failed = False

    def note(self, **event: Any) -> None:
        self._events.append(event)

    def tell(self) -> None:
        """Everything since the last time."""
        events, self._events = self._events, []
        for some in _portions(events):
            multihost.exchange(some)

    def end(self) -> None:
        """The others follow no longer."""
        if not self.failed:
            self.note(end=True)
            self.tell()

    def fail(self, error: BaseException) -> None:
        """A turn has failed here. What the others wait for, nobody knows: they end."""
        self.failed = True
        multihost.report(error)


def _portions(events: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """As many events as fit into a message: those with pictures go alone."""
    some: list[dict[str, Any]] = []
    for event in events:
        some.append(event)
        if ("add" in event and event["add"]["tiles"]) or len(some) == PORTION:
            yield some
            some = []
    if some:
        yield some


@contextlib.contextmanager
def leading() -> Iterator[Leader]:
    """Process 0, while the others follow."""
    leader = Leader()
    try:
        yield leader
    except UserError:
        leader.end()
        raise
    except BaseException as error:
        leader.fail(error)
        raise
    leader.end()


def told() -> Iterator[dict[str, Any]]:
    """What process 0 does, on another one, as it comes."""
    while True:
        for event in multihost.exchange(None)[0]:
            if "end" in event:
                return
            yield event


def check_same(model: Llama4, limits: Limits, room: Room, adapters: NamedAdapters) -> None:
    """Before anything is compiled: do all processes have the same engine?

    Raises:
      UserError: on every process, naming each part that differs.
    """
    if multihost.process_count() == 1:
        return
    parameters = [(x.shape, x.dtype.name) for x in jax.tree.leaves(model)]
    settings = {f"the engine's {name}": str(value) for name, value in dataclasses.asdict(limits).items()}
    digests = {
        "the model": _digest(model.config, parameters),
        "the engine's adapters": _digest(list(adapters.digests.items())),
        "the engine's programs": _digest(shapes(limits), room.dtype, room.geometry.routed),
    }
    multihost.check_same(settings | digests | {"llguidance": _version_of("llguidance")})


def as_json(request: Admitted) -> dict[str, Any]:
    """A request as JSON holds it; `from_json` makes it again.

    Raises:
      UserError: its pictures are more than one process can tell another.
    """
    if request.tiles is not None and request.tiles.nbytes > MOST_PIXELS:
        raise UserError(f"{len(request.tiles)} tiles of pictures are too many for a run of several processes: send fewer with one request.")
    sampling, grammar = dataclasses.asdict(request.sampling), request.grammar
    return {
        "ids": request.ids.tolist(),
        "tiles": None if request.tiles is None else {"shape": request.tiles.shape, "float32": _text(request.tiles)},
        "max_new_tokens": request.max_new_tokens,
        "sampling": sampling | {"logit_bias": list((request.sampling.logit_bias or {}).items())},
        "stop_ids": sorted(request.stop_ids),
        "deadline": request.deadline,
        "grammar": grammar and {grammar.kind: getattr(grammar, grammar.kind)},
        "prompt_logprobs": request.prompt_logprobs,
        "adapter": request.adapter,
        "routed_experts_prompt_start": request.routed_experts_prompt_start,
    }


def from_json(told: dict[str, Any]) -> Request:
    tiles, sampling, grammar = told["tiles"], told["sampling"], told["grammar"]
    return Request(
        ids=told["ids"],
        tiles=tiles and np.frombuffer(base64.b64decode(tiles["float32"]), np.float32).reshape(tiles["shape"]),
        max_new_tokens=told["max_new_tokens"],
        sampling=Sampling(**sampling | {"logit_bias": dict(map(tuple, sampling["logit_bias"])) or None}),
        stop_ids=told["stop_ids"],
        deadline=told["deadline"],
        grammar=grammar and Grammar(**grammar),
        prompt_logprobs=told["prompt_logprobs"],
        adapter=told["adapter"],
        routed_experts_prompt_start=told["routed_experts_prompt_start"],
    )


def _text(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array, np.float32).data).decode()


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, default=vars)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
