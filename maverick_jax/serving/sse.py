"""Server-sent events, the form of streams."""

from __future__ import annotations

import json
from typing import Any

DONE = b"data: [DONE]\n\n"  # how a stream of OpenAI's ends
_encode = json.JSONEncoder(separators=(",", ":")).encode


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {_encode(data)}\n\n".encode()
