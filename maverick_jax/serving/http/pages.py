"""The page at `/`: a conversation in a browser. It has no build step, and fetches nothing from outside."""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}


def routes() -> list[Route]:
    """Of the page and its parts."""
    return [Route(path, _file(name)) for path, name in FILES.items()]


def _file(name: str):
    data = resources.files("maverick_jax.serving.http").joinpath("page", name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(data, media_type=KINDS[name.rpartition(".")[2]], headers=HEADERS)

    return answer
