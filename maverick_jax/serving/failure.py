"""What goes wrong, as an HTTP status and a message for whoever can mend it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import NoRoom
from maverick_jax.inference.handle import Stopped
from maverick_jax.inference.request import Full

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}  # others by their first digit
AGAIN_S = 1  # after which a client that found no place may try again


class Failure(Exception):
    """A request that is not answered.

    Attributes:
      status: of HTTP.
      message: one line that names what is wrong.
      field: of the body, that is wrong; None if it is none of them.
      code: OpenAI's word for it, if it has one.
      headers: that go with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        field: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.field, self.code, self.headers = status, message, field, code, dict(headers or {})

    @property
    def kind(self) -> str:
        """As clients name it."""
        return KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


def failure_of(error: Exception, body: Any = None) -> Failure:
    """
    Args:
      error: what was raised while a request was looked at.
      body: of the request. A message begins with the name of the field that it is about.
    """
    if isinstance(error, Failure):
        return error
    if isinstance(error, Full):
        return Failure(429, str(error), code="rate_limit_exceeded", headers={"retry-after": str(AGAIN_S)})
    if isinstance(error, Stopped):
        return Failure(503, str(error), headers={"retry-after": str(AGAIN_S)})
    if isinstance(error, UserError):
        field = str(error).partition(" ")[0]
        known = field if isinstance(body, dict) and (field in body or field in ("messages", "prompt")) else None
        return Failure(400, str(error), field=known, code="context_length_exceeded" if isinstance(error, NoRoom) else None)
    return Failure(500, "the server stumbled over this request; its log says why.")


def openai_body(failure: Failure) -> dict[str, Any]:
    """As OpenAI's clients read it."""
    return {"error": {"message": failure.message, "type": failure.kind, "param": failure.field, "code": failure.code}}
