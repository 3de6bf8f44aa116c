"""Seconds that jax spent on tracing and compiling, so that they are not counted as work."""

from __future__ import annotations

import itertools
import time

import jax

_spans: list[tuple[float, float]] = []  # disjoint intervals, in order


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event.startswith("/jax/core/compile/"):
        end = time.perf_counter()
        start = end - duration_secs
        while _spans and _spans[-1][0] >= start:  # inner functions report before the one they belong to
            _spans.pop()
        _spans.append((start, end))


jax.monitoring.register_event_duration_secs_listener(_listen)


def seconds_compiling(since: float) -> float:
    """Seconds of tracing and compiling since `since` (of `time.perf_counter`)."""
    recent = itertools.takewhile(lambda span: span[1] > since, reversed(_spans))
    return sum(end - max(start, since) for start, end in recent)
