"""Ctrl-C ends the command at any moment: one line, status 130, nothing else.

A thread answers it. Python raises KeyboardInterrupt in the main thread alone, and only between two lines of Python: while a
compiler works that is half a minute late, in the middle of an import it becomes an ImportError, and unwinding under libraries that
have threads of their own has ended in segmentation faults. What the commands write may be left at any byte, as after kill -9.

Always, once `watch` was called: every SIGINT puts a byte into a pipe, in C and at once; then Python calls `_handle` in the main
thread when it can, which writes what came of it into the same pipe. So the thread that reads sees both in their order.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator

STATUS = 128 + signal.SIGINT
AGAIN_S = 0.02  # to be out of a callback
FAREWELL_S = 0.5  # for a full pipe, or a lock that the main thread holds
_RAISED, _OUTSIDE = b"R", b"O"  # what came of a SIGINT; its own byte is its number

_pipe = -1  # where signals are written
_inside = False  # of `raised`
_hint = ""
_leaving = threading.Lock()
_farewells: list[Callable[[], object]] = []


def watch() -> None:
    """From now on Ctrl-C ends this process, until it has ended by itself. For the main thread of a process that is ours."""
    global _pipe
    if _pipe >= 0 or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as `nohup` and shells' background jobs want it
        return
    reader, _pipe = os.pipe()
    os.set_blocking(_pipe, False)
    signal.set_wakeup_fd(_pipe, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _handle)
    threading.Thread(target=_wait, args=(reader,), daemon=True, name="Ctrl-C").start()
    # The last of the exit functions: the command is done, and what is left of the interpreter has no threads to answer.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """For a command that answers Ctrl-C itself: inside, it is a KeyboardInterrupt of the main thread, as usual.

    While the main thread is in a compiler the first one waits until Python runs again; a second one that comes before ends the
    process as outside. Blocks do not nest. Catch the exception around the block: it may come at the block's very end.
    """
    global _inside
    shown, sys.unraisablehook = sys.unraisablehook, _raise_again
    try:
        _inside = True
        yield
    finally:
        _inside = False
        sys.unraisablehook = shown


def _raise_again(lost) -> None:
    """Python drops what is raised in a callback of the garbage collector, of which jax has one, and says so in a traceback."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(AGAIN_S, os.kill, (os.getpid(), signal.SIGINT)).start()  # here it would be lost once more
    else:
        sys.__unraisablehook__(lost)


def hint(text: str) -> None:
    """What the line shall say besides: what stays, and how to go on."""
    global _hint
    _hint = text and f" {text}"


def before_leaving(call: Callable[[], object]) -> None:
    """`call` is called, in a thread, before the process ends by Ctrl-C; it has half a second."""
    if call not in _farewells:
        _farewells.append(call)


def message() -> str:
    """The line."""
    return f"maverick: interrupted.{_hint}"


def _handle(signum: int, frame: object) -> None:
    """In the main thread, when Python runs."""
    os.write(_pipe, _RAISED if _inside else _OUTSIDE)
    if _inside:
        raise KeyboardInterrupt


def _wait(reader: int) -> None:
    waiting = False  # for the main thread to raise an earlier one
    while True:
        match os.read(reader, 1):
            case b"R":
                waiting = False
            case b"O":
                end()
            case other if other[0] != signal.SIGINT:  # which has a handler of its own
                pass
            case _ if waiting or not (_inside or _is_readable(reader)):
                end()
            case _:  # inside, or it was when Python raised: the pipe says so next
                waiting = True


def _is_readable(reader: int) -> bool:
    return bool(select.select([reader], [], [], 0)[0])


def end() -> int:
    """Say the line, and end the process if `watch` made it ours; else return the status."""
    if _pipe < 0:
        print(message(), file=sys.stderr)
        return STATUS
    _leaving.acquire()  # never released: who comes second waits here for the end
    thread = threading.Thread(target=_say_farewell, daemon=True)
    thread.start()
    thread.join(FAREWELL_S)
    start = "\n" if os.isatty(2) else ""  # behind an unfinished line, or the terminal's ^C
    with contextlib.suppress(OSError):
        os.write(2, f"{start}{message()}\n".encode())
    os._exit(STATUS)


def _say_farewell() -> None:
    for call in (*_farewells, sys.stdout.flush):
        with contextlib.suppress(Exception):
            call()
