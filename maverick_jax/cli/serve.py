"""Serve a model to the clients that people have: OpenAI's chat completions, responses and completions, Anthropic's messages, streamed or
whole, with pictures and tools, and a page to chat at. Without -m the mini model serves, so that a client can be tried at once.

API keys are those of --keys FILE (one per line, or an owner's name and a key) or of MAVERICK_API_KEYS, between commas; with neither,
whoever reaches the port may ask, and by default that is this machine alone. Ctrl-C or SIGTERM ends the server: answers that run have
--grace seconds, then their clients are told. A second Ctrl-C tells them at once.

examples:
  maverick serve
  maverick serve -m maverick --mesh expert=8 --warm-up --host 0.0.0.0 --keys keys.txt
  maverick serve -m maverick --adapter support=runs/support/adapter --adapter poems=runs/poems/adapter
  maverick serve -m maverick --name llama-4-maverick --slots 64 --draft 4 --access-log access.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from maverick_jax.cli import compilation, interrupt, options
from maverick_jax.cli.parser import given_words, real, whole

if TYPE_CHECKING:
    import socket

    from maverick_jax.inference.engine import Engine
    from maverick_jax.serving.http.app import Settings
    from maverick_jax.serving.http.server import Server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", type=given_words, default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (default: 127.0.0.1)")
    parser.add_argument("--port", type=whole, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    parser.add_argument(
        "--name",
        type=given_words,
        action="append",
        metavar="NAME",
        help="of the model for clients (default: its directory's); may be repeated",
    )
    options.add_model_arguments(parser)
    options.add_adapters_argument(parser)
    options.add_engine_arguments(parser)
    parser.add_argument("--routed-experts", action="store_true", help="tell with each answer which experts computed it, for trainers")
    parser.add_argument("--warm-up", action="store_true", help="compile all programs first, so that nobody's first request waits for it")
    parser.add_argument("--queue", type=whole, default=1024, metavar="N", help="requests that may wait; others are refused (default: 1024)")
    parser.add_argument("--keys", metavar="FILE", help="API keys; read again when it has changed")
    parser.add_argument("--per-key", type=whole, metavar="N", help="requests that a key may have running (default: any number)")
    parser.add_argument("--max-body", type=whole, default=64 << 20, metavar="BYTES", help="longest request (default: 64 MiB)")
    parser.add_argument(
        "--origin", type=given_words, action="append", default=[], metavar="URL", help="pages in browsers that may ask; may be repeated"
    )
    parser.add_argument(
        "--images-from",
        type=given_words,
        action="append",
        default=[],
        metavar="HOST",
        help="fetch pictures by https from here, *.example.org or * for every public host; may be repeated (default: nothing is fetched)",
    )
    parser.add_argument("--grace", type=real, default=30.0, metavar="S", help="seconds for running answers at the end (default: 30)")
    parser.add_argument("--access-log", metavar="FILE", help="a line of JSON per request, without prompts; - for standard error")
    parser.add_argument("--verbose", action="store_true", help="name what clients send and nobody knows")
    parser.add_argument("--quiet", action="store_true", help="say nothing but mistakes")
    compilation.add_argument(parser)


@options.on_every_process
@compilation.programs_kept
def run(args: argparse.Namespace) -> int:
    from maverick_jax.sharding import multihost

    require_extra()
    names = args.name or [options.model_name(args)]
    with contextlib.ExitStack() as stack:
        front = stack.enter_context(_front(args)) if multihost.is_first() else None  # what is wrong is told before a large model is loaded
        engine = stack.enter_context(options.engine_for(args, names, queue=args.queue, routed_experts=args.routed_experts))
        if args.warm_up:
            engine.warm_up(progress=not args.quiet)
        if front is None:
            engine.follow()
        else:
            engine.lead(lambda: _serve(args, engine, names, *front))
    return 0


@contextlib.contextmanager
def _front(args: argparse.Namespace) -> Iterator[tuple[Settings, socket.socket]]:
    """What clients meet first: the address, not yet open, and who may ask how much."""
    from maverick_jax.serving.http.app import Settings
    from maverick_jax.serving.http.keys import Keys
    from maverick_jax.serving.http.server import bound

    keys = Keys(args.keys, args.per_key)
    with _log(args.access_log) as written, bound(args.host, args.port) as address:
        yield Settings(keys=keys, longest=args.max_body, origins=args.origin, grace_s=args.grace, written=written), address


def require_extra() -> None:
    """
    Raises:
      UserError: what the server is made of is not installed.
    """
    import importlib

    from maverick_jax.errors import UserError

    try:
        for package in ("llguidance", "prometheus_client", "starlette", "uvicorn"):
            importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"the server takes the extra `server` ({error}): pip install 'maverick-jax[server]'.") from error


def _serve(args: argparse.Namespace, engine: Engine, names: list[str], settings: Settings, address: socket.socket) -> None:
    import logging

    from maverick_jax.serving.http.fetch import Fetch
    from maverick_jax.serving.http.server import Server
    from maverick_jax.serving.http.service import Service
    from maverick_jax.serving.pictures import refuse_address

    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    with engine:
        fetch = Fetch(args.images_from) if args.images_from else refuse_address
        server = Server(Service(engine, names, fetch), settings, address)
        if not args.quiet:
            say(server, engine, names[0], keyed=settings.keys.needed)
        _until_stopped(server)


def say(server: Server, engine: Engine, name: str, *, keyed: bool) -> None:
    """Where it listens, and what to type."""
    key = ' -H "Authorization: Bearer $KEY"' if keyed else ""
    body = '{"messages": [{"role": "user", "content": "What is the sum?"}]}'
    print(f"{engine.room}", file=sys.stderr)
    print(f"{', '.join([name, *engine.adapters])} at {server.url}/v1; Ctrl-C ends it. Try\n")
    print(f"  curl {server.url}/v1/chat/completions{key} -H 'content-type: application/json' \\\n    -d '{body}'\n", flush=True)


@contextlib.contextmanager
def _log(name: str | None) -> Iterator[Any]:
    """What takes the lines of the access log, if there is one."""
    if name is None:
        yield None
    elif name == "-":
        yield lambda line: print(line, file=sys.stderr, flush=True)
    else:
        with open(name, "a", encoding="utf-8", buffering=1) as file:
            yield lambda line: file.write(f"{line}\n")


def _until_stopped(server: Server) -> None:
    """Serve until Ctrl-C or SIGTERM."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        with interrupt.raised():
            try:
                with server:
                    server.wait()
            except KeyboardInterrupt:
                server.close(now=True)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
