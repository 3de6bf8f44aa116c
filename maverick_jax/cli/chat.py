"""Talk with a model. Commands inside: /image FILE adds a picture to the next question, /reset forgets the conversation,
/quit (or end of input) ends it. Ctrl-C stops an answer; in a run of several processes it ends the chat.

examples:
  maverick chat
  maverick chat -m maverick --mesh expert=8 --temperature 0.6 --top-p 0.9
"""

import argparse
import base64
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from maverick_jax.cli import compilation, options, status

HELP = "/image FILE   add a picture to the next question\n/reset        forget the conversation\n/quit         end"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_arguments(parser)
    options.add_sampling_arguments(parser)
    compilation.add_argument(parser)


@options.on_every_process
@compilation.programs_kept
def run(args: argparse.Namespace) -> int:
    from maverick_jax.errors import UserError
    from maverick_jax.inference.chat import Chat
    from maverick_jax.sharding import multihost

    chat = Chat(options.load_model(args), **options.chat_options(args))
    pictures: list[bytes] = []
    for line, picture in multihost.from_first(_lines()):
        try:
            if line == "/reset":
                chat.reset()
                pictures.clear()
            elif picture:
                pictures.append(base64.b64decode(picture))
            elif line:
                _answer(chat, line, pictures, as_json=args.json)
                pictures.clear()
        except UserError as error:  # the conversation goes on
            options.note(f"maverick: {error}")
    return 0


def _lines() -> Iterator[tuple[str, str]]:
    """What the user types, with the picture that /image names (base64: process 0 alone can see the file)."""
    from maverick_jax.errors import UserError
    from maverick_jax.prompt import load_picture

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing for input()
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/image":
            try:
                load_picture(rest.strip())
            except UserError as error:
                print(f"maverick: {error}", file=sys.stderr)
            else:
                yield line, base64.b64encode(Path(rest.strip()).read_bytes()).decode()
        elif command.startswith("/") and line != "/reset":
            print(HELP, file=sys.stderr)
        else:
            yield line, ""


def _answer(chat, question: str, pictures: list, *, as_json: bool) -> None:
    from maverick_jax.sharding import multihost

    answer = ""
    try:
        for portion in status.awaited("computing", chat.stream(question, pictures)):
            answer += portion
            if not as_json:
                print(portion, end="", flush=True)
    except KeyboardInterrupt:
        if multihost.process_count() > 1:  # the others are in the middle of a computation that needs this process
            raise
        print(" [stopped]", file=sys.stderr)
        return
    if as_json:
        print(options.as_json(answer, chat.last), flush=True)
    else:
        print()
        options.note(options.speed(chat.last))
