"""One end of a connection between two processes of a run: lines of JSON, bounded in size and, where asked, in time."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from maverick_jax.errors import UserError

GREETING_BYTES = 2**16  # of a line from somebody who has not yet shown that he belongs to the run
MESSAGE_BYTES = 2**28  # of a line from somebody who has: a prompt of ten million tokens and a photograph fit

# A machine that loses power closes nothing: half a minute without an answer counts as lost. Not every system has these.
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


class Gone(Exception):
    """The other end has closed the connection, or said nothing in time."""


class Garbled(Exception):
    """The other end sent what is no message; says what was wrong with it."""


class Connection:
    """One end of a connection, with messages instead of bytes."""

    def __init__(self, connected: socket.socket):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            if hasattr(socket, option):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        connected.settimeout(None)
        self.socket = connected
        self._received = bytearray()
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """
        Raises:
          UserError: the message is longer than the other end reads.
        """
        line = json.dumps(message).encode() + b"\n"
        if len(line) > MESSAGE_BYTES:
            raise UserError(
                f"a message of {len(line):,} bytes is more than the {MESSAGE_BYTES:,} that one process of a run can tell another: take a "
                "shorter prompt or a smaller picture."
            )
        with self._sending, contextlib.suppress(OSError):  # that a peer is gone, its reader tells
            self.socket.sendall(line)

    def receive(self, *, limit: int = MESSAGE_BYTES, deadline: float | None = None) -> dict[str, Any]:
        """The next message.

        Args:
          limit: bytes that its line may have.
          deadline: by `time.monotonic()`, for the whole line however slowly it comes; None waits for ever.

        Raises:
          Gone, Garbled: there is none.
        """
        line = self._line(limit, deadline)
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Garbled(f"a line that is not JSON ({type(error).__name__})") from error
        if not isinstance(message, dict):
            raise Garbled(f"a JSON {type(message).__name__} instead of an object")
        return message

    def _line(self, limit: int, deadline: float | None) -> bytes:
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0 and len(self._received) <= limit:
            searched = len(self._received)
            self._received += self._read(deadline)
        if not 0 <= end <= limit:
            self._received.clear()
            raise Garbled(f"a line of more than {limit:,} bytes")
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def _read(self, deadline: float | None) -> bytes:
        try:
            if deadline is not None:
                self.socket.settimeout(max(1e-3, deadline - time.monotonic()))
            data = self.socket.recv(2**16) if deadline is None or time.monotonic() < deadline else b""
            self.socket.settimeout(None)
        except OSError as error:
            raise Gone from error
        if not data:
            raise Gone
        return data

    def hang_up(self) -> None:
        """End the connection from another thread: one that waits in `receive` finds it gone."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()


def connect(address: tuple[str, int], limit_s: float, notice: Callable[[], None] = lambda: None) -> socket.socket | OSError:
    """A connection, or why there was none in time."""
    end = time.monotonic() + limit_s
    while True:
        try:
            connected = socket.create_connection(address, timeout=max(1.0, min(5.0, limit_s)))
            connected.settimeout(None)
            return connected
        except OSError as error:
            if time.monotonic() > end:
                return error
        notice()
        time.sleep(0.2)
