"""What is reported of time: compiling is not counted as work, and the first tokens are the prefill's."""

import time

import pytest

from maverick_jax.inference import clock
from maverick_jax.inference.generate import engine_for
from maverick_jax.inference.request import Request
from oracle.plain import plain_model


def test_seconds_compiling(monkeypatch):
    """Functions within functions are compiled once, not twice, and of what began earlier only the part since then counts."""
    monkeypatch.setattr(clock, "_spans", [])
    for end, duration, event in (
        (3.0, 1.0, "/jax/core/compile/jaxpr_trace_duration"),
        (5.0, 1.0, "/jax/core/compile/jaxpr_trace_duration"),  # within the next one
        (6.0, 2.5, "/jax/core/compile/backend_compile_duration"),
        (8.0, 1.5, "/jax/checkpoint/write"),
        (9.0, 0.5, "/jax/core/compile/backend_compile_duration"),
    ):
        monkeypatch.setattr(clock.time, "perf_counter", lambda end=end: end)
        clock._listen(event, duration)
    assert [clock.seconds_compiling(since) for since in (0.0, 2.5, 5.0, 6.0, 9.0)] == [4.0, 3.5, 1.5, 0.5, 0.0]


def test_a_request_is_divided_into_compiling_prefill_and_decode():
    """A first run compiles and a second one does not; together the parts are what a clock on the wall shows."""
    request = Request(ids=[1, 2, 3], max_new_tokens=9, stop_ids=())
    for compiles in (True, False):
        engine = engine_for(plain_model(num_hidden_layers=2), [12])
        started = time.perf_counter()
        (handle,) = engine.run([request])
        passed = time.perf_counter() - started
        assert (handle.seconds["compile"] > 0) == compiles
        assert min(handle.seconds["prefill"], handle.seconds["decode"]) > 0
        assert sum(handle.seconds.values()) <= passed
    assert handle.decode_rate == pytest.approx(8 / handle.seconds["decode"])
    handle.seconds["decode"] = 0.0
    assert handle.decode_rate == 0.0
