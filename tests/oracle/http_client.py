"""A client without habits: what is sent and what comes back, byte by byte, streams event by event."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any  # JSON where it is some, else text

    @property
    def error(self) -> dict[str, Any]:
        """Of OpenAI's form, which every failure has."""
        assert set(self.body) == {"error"}, self.body
        assert set(self.body["error"]) == {"message", "type", "param", "code"}
        assert "\n" not in self.body["error"]["message"]
        return self.body["error"]


class Client:
    """Asks a server, a connection for each request."""

    def __init__(self, url: str, **headers: str):
        self.host, self.port = urlsplit(url).hostname or "", urlsplit(url).port
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @contextlib.contextmanager
    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Iterator[http.client.HTTPResponse]:
        data = json.dumps(body).encode() if isinstance(body, dict | list | str) else body  # bytes, or pieces of them
        with contextlib.closing(http.client.HTTPConnection(self.host, self.port, timeout=120)) as connection:
            connection.request(method, path, data, {"content-type": "application/json", **self.headers, **(headers or {})})
            with connection.getresponse() as response:
                yield response

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        with self.send(method, path, body, headers) as response:
            text = response.read().decode()
            kind = response.headers.get("content-type", "")
            named = {name.lower(): value for name, value in response.headers.items()}
            return Answer(response.status, named, json.loads(text) if "json" in kind else text)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, None, {name.replace("_", "-"): value for name, value in headers.items()})

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})

    def events(self, path: str, body: dict[str, Any]) -> Iterator[Any]:
        """The data of a stream's events, as they come; its end is "[DONE]"."""
        with self.send("POST", path, body | {"stream": True}) as response:
            assert response.status == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response:
                if line.startswith(b"data: "):
                    data = line[6:].decode().strip()
                    yield data if data == "[DONE]" else json.loads(data)

    def connect(self, request: bytes, *, receive_buffer: int | None = None) -> socket.socket:
        """A connection that has sent something."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect((self.host, self.port))
        connection.sendall(request)
        return connection


def choices_of(events: list) -> list[dict]:
    """A stream's answers, put together as a client does; only the last chunk of each choice says why it ended."""
    choices: dict[int, dict] = {}
    for event in events[:-1]:
        assert event["object"] in ("chat.completion.chunk", "text_completion")
        assert event["id"] == events[0]["id"]
        for part in event["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "calls": {}, "logprobs": [], "token_ids": [], "finish_reason": None})
            assert choice["finish_reason"] is None
            choice["finish_reason"] = part["finish_reason"]
            choice["text"] += part.get("text", part.get("delta", {}).get("content")) or ""
            choice["token_ids"] += part.get("token_ids", [])
            choice["routed_experts"] = part.get("routed_experts")
            choice["logprobs"] += ((part["logprobs"] or {}).get("content") or []) if "delta" in part else [part["logprobs"]]
            for call in part.get("delta", {}).get("tool_calls", []):
                whole = choice["calls"].setdefault(call["index"], {"id": call.get("id"), "name": "", "arguments": ""})
                whole["name"] += call["function"].get("name", "")
                whole["arguments"] += call["function"]["arguments"]
    assert events[-1] == "[DONE]"
    assert all(choice["finish_reason"] for choice in choices.values())
    return [choices[index] for index in sorted(choices)]


def until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for what soon comes: a server counts and logs a request when it is over, a moment after its client has everything."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
