"""One request and its answer over HTTP: read within limits, answered whole or as it comes, and given up when the client is gone.

Always: a client that reads slowly, or not at all, costs the engine nothing: the answer is computed at the engine's pace, and waits here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from maverick_jax.json_file import MAX_VALUES, parse_json
from maverick_jax.serving.dialect import Dialect
from maverick_jax.serving.failure import Failure, failure_of
from maverick_jax.serving.http.service import Service
from maverick_jax.serving.reply import Reply

BODY_S = 60.0  # a body may take to come
REST_S = 5.0  # and the rest of one that is refused
log = logging.getLogger("maverick.serve")


class Gone(Exception):
    """The client does not listen any more."""


class Exchange:
    """An ASGI endpoint of a dialect.

    Args:
      longest: bytes of a body.
    """

    def __init__(self, service: Service, dialect: Dialect, longest: int):
        self._service, self._dialect, self._longest = service, dialect, longest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body: list[Any] = []  # once it is read
        try:
            data = await read_body(Request(scope, receive), self._longest)
            async with _while_connected(receive), self._service.asked(lambda: self._submit(data, body)) as reply:
                scope["state"]["reply"] = reply
                await (self._stream(reply, send) if reply.job.stream else self._whole(reply, send))
        except Gone:
            scope["state"]["gone"] = True
        except Exception as error:
            failure = failure_of(error, body[0] if body else None)
            if failure.status == 500:
                log.exception("a request failed")
            await send_json(send, failure.status, self._dialect.failed(failure), failure.headers)

    def _submit(self, data: bytes, body: list[Any]) -> Reply:
        body.append(parsed(data))
        job = self._dialect.read(body[0])
        for line in job.unknown:
            log.debug("%s", line)
        return self._service.submit(job)

    async def _whole(self, reply: Reply, send: Send) -> None:
        async for _ in self._service.portions(reply):
            pass
        await send_json(send, 200, self._dialect.body_of(reply))

    async def _stream(self, reply: Reply, send: Send) -> None:
        stream = self._dialect.Stream(reply)
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
        await send({"type": "http.response.start", "status": 200, "headers": encoded(headers)})
        await _send_events(send, stream.begin())
        try:
            async for index, portion in self._service.portions(reply):
                await _send_events(send, stream.push(index, portion))
        except Exception as error:  # the status has been sent: it is told within the stream
            failure = failure_of(error)
            failure = Failure(failure.status, str(error)) if failure.status != 500 else failure
            log.warning("a stream failed: %s", error)
            await _send_events(send, stream.fail(failure))
        else:
            await _send_events(send, stream.end())
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_events(send: Send, events: Iterable[bytes]) -> None:
    if data := b"".join(events):
        await send({"type": "http.response.body", "body": data, "more_body": True})


@contextlib.asynccontextmanager
async def _while_connected(receive: Receive) -> AsyncIterator[None]:
    """
    Raises:
      Gone: within the block, as soon as the client is.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watching = asyncio.ensure_future(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise Gone from None
    finally:
        watching.cancel()


async def read_body(request: Request, longest: int) -> bytes:
    """
    Raises:
      Failure: it is too long, or too slow.
      Gone: the client is, in its midst.
    """
    parts, length = [], 0
    too_long = Failure(413, f"the body has more than {longest:,} bytes: send less, or smaller pictures.")
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                parts.append(part)
                length += len(part)
                if length > longest:
                    parts.clear()
                    await _pass_over(request)
                    raise too_long
    except ClientDisconnect:
        raise Gone from None
    except TimeoutError:
        raise Failure(408, f"the body took more than {BODY_S:.0f} seconds to come.", headers={"connection": "close"}) from None
    return b"".join(parts)


async def _pass_over(request: Request) -> None:
    """The rest of a body, for a client that reads no answer before it has sent everything."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REST_S):
            while (await request.receive()).get("more_body"):
                pass


def parsed(data: bytes) -> Any:
    """
    Raises:
      Failure: it is no JSON.
    """
    try:
        return parse_json(data, max_values=MAX_VALUES)
    except (ValueError, RecursionError) as error:
        raise Failure(400, f"the body is not valid JSON ({error}).") from error


async def send_json(send: Send, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
    data = json.dumps(body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
    await send({"type": "http.response.start", "status": status, "headers": encoded(headers)})
    await send({"type": "http.response.body", "body": data})


def encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
