"""What every request goes through: its name, its key, its place among the others, and a line in the log. Prompts are never logged."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maverick_jax.serving.failure import Failure
from maverick_jax.serving.http import pages
from maverick_jax.serving.http.exchange import send_json
from maverick_jax.serving.http.keys import NOBODY, Keys
from maverick_jax.serving.reply import Reply

OPEN = frozenset({*pages.FILES, "/health", "/ping", "/version", "/metrics", "/openapi.json"})  # to everyone, without a key
LONGEST_ID = 128


class Gate:
    """An ASGI application in front of another one.

    Args:
      failed: the body that says to the clients of an address what went wrong.
      written: takes a line of the log.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, failed: Callable[[str, Failure], dict[str, Any]], written: Callable[[str], object] | None = None
    ):
        self._app, self._keys, self._failed, self._written = app, keys, failed, written

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        state: dict[str, Any] = {"owner": NOBODY}
        scope["state"] = state
        id = headers.get("x-request-id", "")[:LONGEST_ID] or uuid.uuid4().hex
        began, status = time.perf_counter(), 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode("latin-1", "replace"))]
            await send(message)

        try:
            if scope["path"] in OPEN or scope["method"] == "OPTIONS":
                return await self._app(scope, receive, send_named)
            state["owner"] = self._keys.owner(headers)
            with self._keys.one_more(state["owner"]):
                await self._app(scope, receive, send_named)
        except Failure as failure:
            await send_json(send_named, failure.status, self._failed(scope["path"], failure), failure.headers)
        finally:
            if self._written is not None:
                self._written(_line(scope, state, id, status, time.perf_counter() - began))


def _line(scope: Scope, state: dict[str, Any], id: str, status: int, seconds: float) -> str:
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "request": id,
        "client": (scope.get("client") or ("",))[0],
        "key": state["owner"],
        "method": scope["method"],
        "path": scope["path"],
        "status": 499 if state.get("gone") else status,  # nginx's for a client that went away
        "seconds": round(seconds, 4),
    }
    if isinstance(reply := state.get("reply"), Reply):
        line |= {
            "model": reply.model,
            "prompt_tokens": reply.prompt_tokens,
            "cached_tokens": reply.cached_tokens,
            "new_tokens": reply.new_tokens,
            "finish": [answer.finish for answer in reply.answers],
        }
    return json.dumps(line)
