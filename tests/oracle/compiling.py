"""Count what jax compiles, and lower for a card that is not there."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType


@contextlib.contextmanager
def no_compilation() -> Iterator[None]:
    """Nothing is compiled within."""
    compiled = []

    def listen(event: str, duration: float, **_) -> None:
        compiled.extend([event] * event.startswith("/jax/core/compile/backend_compile"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def on_an_h200() -> contextlib.AbstractContextManager:
    """A context in which `lower(lowering_platforms=("cuda",))` is for that card, which jax wants to know since 0.12."""
    about = {"device_kind": "NVIDIA H200", "num_cores": None, "platform": "gpu"}  # the last since jax 0.12
    card = AbstractDevice(**{field.name: about[field.name] for field in dataclasses.fields(AbstractDevice)})
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=card))


def count_products(text: str) -> int:
    """Kernels of ours in a compiled text for GPUs that multiply: those that plan the work, or make activations float16, take one array."""
    calls = re.findall(r"custom-call\(([^)]*)\)[^\n]*__gpu\$xla\.gpu\.triton", text)
    return sum("," in operands for operands in calls)
