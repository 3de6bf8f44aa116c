"""A line that says what is being done where that takes a while; on a terminal it is wiped off when it is done.

Where standard error is no terminal, somebody keeps it or a program reads it: a line there stays, comes late, and only once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator

from maverick_jax.cli import interrupt

AT_TERMINAL_S, ELSEWHERE_S = 1.0, 10.0
SAVE, WIPE = "\x1b7", "\x1b8\x1b[J"  # the cursor may stand behind half an answer
_END = object()

_speaking = False
_lock = threading.Lock()  # of all below
_doing: list[str] = []  # what is being done; inside it, perhaps, compiling
_shown = False  # on a terminal
_said: set[str] = set()  # elsewhere


def speak() -> None:
    """From now on `doing` says so; for a process that is ours, whose user did not ask for silence."""
    global _speaking
    _speaking = True
    interrupt.before_leaving(_wipe)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """While the block runs, after a second, `what` can be read. In a run of several processes only the first says it."""
    if not _speaking or not _is_first() or os.environ.get("TERM") == "dumb":
        yield
        return
    with _lock:
        _doing.append(what)
    timer = threading.Timer(AT_TERMINAL_S if sys.stderr.isatty() else ELSEWHERE_S, _show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with _lock:
            _doing.clear()
        _wipe()


def awaited(what: str, values: Iterable[str]) -> Iterator[str]:
    """The same values; `doing` while one is waited for."""
    waiting = iter(values)
    while True:
        with doing(what):
            value = next(waiting, _END)
        if value is _END:
            return
        assert isinstance(value, str)
        yield value


def watch_compiler() -> None:
    """jax tells when a program is ready to be compiled, and when it has been."""
    if not _speaking:
        return
    import jax

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        with _lock:
            if event == "/jax/core/compile/jaxpr_to_mlir_module_duration" and len(_doing) == 1:
                _doing.append("compiling (once per shape)")
            elif event == "/jax/core/compile/backend_compile_duration" and len(_doing) == 2:
                _doing.pop()
            else:
                return
        if _shown:
            _wipe()
            _show()

    jax.monitoring.register_event_duration_secs_listener(listen)


def _is_first() -> bool:
    multihost = sys.modules.get("maverick_jax.sharding.multihost")
    return sys.stderr.isatty() if multihost is None else multihost.is_first()


def _show() -> None:
    global _shown
    with _lock:
        if not _doing or _shown:
            return
        text = f"{_doing[-1]} …"
        if sys.stderr.isatty():
            _shown = True
            print(f"{SAVE}{text}", end="", file=sys.stderr, flush=True)
        elif text not in _said:
            _said.add(text)
            print(text, file=sys.stderr)


def _wipe() -> None:
    global _shown
    with _lock:
        if _shown:
            _shown = False
            print(WIPE, end="", file=sys.stderr, flush=True)
