"""Standard input, output and error as they really are: closed, full, or of an encoding that lacks a character."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

from maverick_jax.errors import UserError


class _Out(io.FileIO):
    """Standard output. Its error says whose it is; nobody takes anything any more, so what is still to come goes nowhere."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "standard output"
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            raise


class _Err(io.FileIO):
    """Standard error: what it does not take is lost, since there is nobody to tell."""

    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def prepare() -> None:
    """For a process that is ours, before it opens any file: one would get the number of a stream that is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - it stays open as long as the process
    sys.stderr = _text(_Err(2, "w", closefd=False), sys.stderr)
    if sys.stdout is not None:
        sys.stdout = _text(_Out(1, "w", closefd=False), sys.stdout)


def _text(raw: io.FileIO, stream: Any) -> io.TextIOWrapper:
    """In the encoding that `stream` has; what it lacks is escaped, so that all that can be printed is printed."""
    by_line = stream is None or stream.line_buffering or isinstance(stream.buffer, io.FileIO)  # unbuffered, by PYTHONUNBUFFERED
    return io.TextIOWrapper(io.BufferedWriter(raw), stream and stream.encoding, "backslashreplace", line_buffering=by_line)


def read_input() -> str:
    """All of standard input.

    Raises:
      UserError: it is not text in its encoding.
    """
    try:
        text = sys.stdin.read()
        text.encode()
        return text
    except UnicodeError as error:  # found by Python, or kept by it in surrogates
        raise UserError(f"standard input is no {sys.stdin.encoding}: {strange_byte(error)}.") from error


def strange_byte(error: UnicodeError) -> str:
    """Which byte is none of the encoding, and where."""
    assert isinstance(error, UnicodeDecodeError | UnicodeEncodeError)
    found = error.object[error.start]
    byte = found if isinstance(found, int) else ord(found) & 0xFF  # Python keeps bytes of the command line in surrogates
    return f"byte 0x{byte:02x} at {error.start}"


def require_output() -> None:
    """
    Raises:
      UserError: standard output is closed.
    """
    if sys.stdout is None:
        raise UserError("standard output is closed, so there is nowhere to print: leave out >&-, or write > /dev/null.")


def reason(error: OSError) -> str:
    """What the system refused, in one line."""
    what, why = error.filename, error.strerror or str(error) or type(error).__name__
    why = why[:1].lower() + why[1:]
    return f"{os.fsdecode(what)}: {why}." if isinstance(what, str | bytes) else f"{why}."
