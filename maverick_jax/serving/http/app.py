"""The server as an ASGI application: which address leads where."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from maverick_jax.inference.checks import Range, real, whole
from maverick_jax.serving.dialect import Dialect
from maverick_jax.serving.dialects import chat, completions, messages, responses
from maverick_jax.serving.failure import Failure, failure_of, openai_body
from maverick_jax.serving.http import pages
from maverick_jax.serving.http.exchange import Exchange, Gone
from maverick_jax.serving.http.gate import Gate
from maverick_jax.serving.http.information import Information
from maverick_jax.serving.http.keys import Keys
from maverick_jax.serving.http.service import Service

LONGEST = 64 << 20  # bytes of a body; pictures are in it, with a third more bytes than their files have
DIALECTS: dict[str, Dialect] = {
    chat.URL: chat,
    responses.URL: responses,
    completions.URL: completions,
    messages.URL: messages,
}
GRACE = Range(real, 0.0, 86_400.0, "a number of seconds, at most a day")
MOST = Range(whole, 1, float("inf"), "a number of bytes, 1 or more")
log = logging.getLogger("maverick.serve")


@dataclasses.dataclass(kw_only=True)
class Settings:
    """How a server is run.

    Attributes:
      keys: who may ask.
      longest: bytes of a body.
      origins: of pages in browsers that may ask, "*" for all; none but this server's own by default.
      grace_s: seconds that running answers have when the server closes.
      written: takes a line for each request, JSON without prompts.
    """

    keys: Keys = dataclasses.field(default_factory=Keys)
    longest: int = LONGEST
    origins: Sequence[str] = ()
    grace_s: float = 30.0
    written: Callable[[str], object] | None = None

    def __post_init__(self):
        MOST.check("--max-body", self.longest)
        GRACE.check("--grace", self.grace_s)


def make_app(service: Service, settings: Settings) -> Starlette:
    """The application, which starts the service with its loop and closes it with it."""
    about = Information(service, settings.longest, int(time.time()))
    routes = [Route(url, Exchange(service, dialect, settings.longest), methods=["POST"]) for url, dialect in DIALECTS.items()]
    routes += [
        Route(f"{messages.URL}/count_tokens", about.count_tokens, methods=["POST"]),
        Route("/v1/models", about.models),
        Route("/v1/models/{name:path}", about.model),
        Route("/health", about.health),
        Route("/ping", about.health, methods=["GET", "POST"]),
        Route("/version", about.version),
        Route("/metrics", about.metrics),
        Route("/openapi.json", about.openapi),
        *pages.routes(),
        Route("/tokenize", about.tokenize, methods=["POST"]),
        Route("/detokenize", about.detokenize, methods=["POST"]),
        Route("/tokenizer_info", about.tokenizer_info),
    ]
    middleware = [Middleware(Gate, keys=settings.keys, failed=failed_body, written=settings.written)]
    if settings.origins:
        origins = list(settings.origins)
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    handlers = {HTTPException: _refused, Gone: _gone, Exception: _failed, Failure: _failed, ValueError: _failed}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)


def failed_body(path: str, failure: Failure) -> dict[str, Any]:
    """What says it to the clients of an address."""
    return messages.failed(failure) if path.startswith(messages.URL) else openai_body(failure)


async def _refused(request: Request, error: Exception) -> Response:
    """An address or a method that there is not."""
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path}: {error.detail.lower()}; /openapi.json says what there is."
    return JSONResponse(failed_body(request.url.path, Failure(error.status_code, said)), error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    request.scope["state"]["gone"] = True
    return Response()  # which nobody gets


async def _failed(request: Request, error: Exception) -> Response:
    failure = failure_of(error)
    if failure.status == 500:
        log.error("a request failed", exc_info=error)
    return JSONResponse(failed_body(request.url.path, failure), failure.status, failure.headers)
