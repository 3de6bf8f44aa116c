"""What is reported of time: compiling is not counted as work, and the first tokens are the prefill's."""

import time

import pytest

from maverick_jax.inference import clock
from maverick_jax.inference.generate import Generation
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


def test_a_run_is_divided_into_compiling_prefill_and_decode():
    """A first run compiles and a second one does not; together the parts are what a clock on the wall shows."""
    for compiles in (True, False):
        run = Generation(plain_model(num_hidden_layers=2), [[1, 2, 3]], max_new_tokens=9, stop_ids=())
        started = time.perf_counter()
        list(run)
        passed = time.perf_counter() - started
        assert (run.seconds["compile"] > 0) == compiles
        assert min(run.seconds["prefill"], run.seconds["decode"]) > 0
        assert sum(run.seconds.values()) <= passed
    assert run.decode_rate == pytest.approx(8 / run.seconds["decode"])
    run.seconds["decode"] = 0.0
    run.first_tokens = run.new_tokens
    assert run.decode_rate == 0.0
