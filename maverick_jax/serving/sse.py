"""Server-sent events, the form of streams."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Protocol

from maverick_jax.serving.answer import Portion

DONE = b"data: [DONE]\n\n"  # how a stream of OpenAI's ends
_encode = json.JSONEncoder(separators=(",", ":")).encode


class Stream(Protocol):
    """A reply in a dialect, as it comes: events before the first portion, for each portion, and behind the last one."""

    def begin(self) -> Iterable[bytes]: ...

    def push(self, index: int, portion: Portion) -> Iterable[bytes]:
        """Args: index: of the answer."""
        ...

    def end(self) -> Iterable[bytes]: ...


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {_encode(data)}\n\n".encode()
