"""What a dialect is: how a client asks, how it is answered, whole or as it comes, and how it is told what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from maverick_jax.serving.answer import Portion
from maverick_jax.serving.failure import Failure
from maverick_jax.serving.job import Job
from maverick_jax.serving.reply import Reply


class Stream(Protocol):
    """A reply as it comes: server-sent events before the first portion, for each portion, and behind the last one."""

    def begin(self) -> Iterable[bytes]: ...

    def push(self, index: int, portion: Portion) -> Iterable[bytes]:
        """Args: index: of the answer."""
        ...

    def end(self) -> Iterable[bytes]: ...

    def fail(self, failure: Failure) -> Iterable[bytes]:
        """Instead of the end: what went wrong after the first byte."""
        ...


class Dialect(Protocol):
    """A module of `dialects`."""

    def read(self, body: Any) -> Job:
        """What a body asks for. Raises `UserError`."""
        ...

    def body_of(self, reply: Reply) -> dict[str, Any]:
        """What the client gets when all answers have ended."""
        ...

    def failed(self, failure: Failure) -> dict[str, Any]:
        """The body that says it."""
        ...

    @property
    def Stream(self) -> Callable[[Reply], Stream]: ...
