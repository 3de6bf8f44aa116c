"""Count what jax compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


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
