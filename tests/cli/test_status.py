"""What is being done is said where it takes a while: at a terminal until it is done, elsewhere once, to nobody who wants silence."""

import io
import time

import pytest

from maverick_jax.cli import status


class Stream(io.StringIO):
    """Standard error, at a terminal or not."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def speaking(monkeypatch):
    """`speaking(terminal)`: the stream, after which what is done is said at once."""

    def begin(terminal: bool) -> Stream:
        stream = Stream(terminal)
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setattr(status, "_speaking", True)
        monkeypatch.setattr(status, "_said", set())
        monkeypatch.setattr(status, "AT_TERMINAL_S", 0.0)
        monkeypatch.setattr(status, "ELSEWHERE_S", 0.0)
        monkeypatch.setenv("TERM", "xterm")
        return stream

    return begin


def wait_for(stream: Stream, text: str) -> None:
    end = time.monotonic() + 60
    while text not in stream.getvalue():
        assert time.monotonic() < end, stream.getvalue()
        time.sleep(0.001)


def test_at_a_terminal_it_vanishes(speaking):
    stream = speaking(terminal=True)
    with status.doing("loading"):
        wait_for(stream, "loading …")
    assert stream.getvalue() == f"{status.SAVE}loading …{status.WIPE}"


def test_elsewhere_it_is_said_once(speaking):
    stream = speaking(terminal=False)
    for _ in range(2):
        with status.doing("loading"):
            wait_for(stream, "loading …")
    assert stream.getvalue() == "loading …\n"


def test_what_is_quick_is_not_said(speaking, monkeypatch):
    stream = speaking(terminal=True)
    monkeypatch.setattr(status, "AT_TERMINAL_S", 600.0)
    with status.doing("loading"):
        pass
    assert stream.getvalue() == ""


@pytest.mark.parametrize("reason", ["asked for silence", "another process", "a dumb terminal"])
def test_to_nobody_who_wants_silence(speaking, monkeypatch, reason):
    stream = speaking(terminal=True)
    if reason == "asked for silence":
        monkeypatch.setattr(status, "_speaking", False)
    elif reason == "another process":
        monkeypatch.setattr("maverick_jax.sharding.multihost.is_first", lambda: False)
    else:
        monkeypatch.setenv("TERM", "dumb")
    with status.doing("loading"):
        time.sleep(0.05)
    assert stream.getvalue() == ""


def test_compiling_is_told_apart(speaking):
    """The longest silence of all; afterwards the line says again what it is part of."""
    import jax

    stream = speaking(terminal=True)
    status.watch_compiler()
    with status.doing("computing"):
        wait_for(stream, "computing …")
        jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_to_mlir_module_duration", 1.0)
        wait_for(stream, "compiling (once per shape) …")
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1.0)
    assert [part.split(" …")[0] for part in stream.getvalue().split(status.SAVE)[1:]] == [
        "computing",
        "compiling (once per shape)",
        "computing",
    ]


def test_values_pass_through():
    assert list(status.awaited("computing", iter(["a", "b"]))) == ["a", "b"]
