"""Talk with a model. Commands inside: /image FILE adds a picture to the next question, /reset forgets the conversation,
/quit (or end of input) ends it. Ctrl-C stops an answer.

examples:
  maverick chat
  maverick chat -m maverick --mesh expert=8 --temperature 0.6 --top-p 0.9
"""

import argparse
import contextlib
import sys

from maverick_jax.cli import options

HELP = "/image FILE   add a picture to the next question\n/reset        forget the conversation\n/quit         end"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_arguments(parser)
    options.add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    options.quiet_accelerator_search()
    from maverick_jax.errors import UserError
    from maverick_jax.inference.chat import Chat
    from maverick_jax.prompt import load_picture

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing for input()
    chat = Chat(options.load_model(args), **options.chat_options(args))
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    pictures: list = []
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return 0
            elif command == "/reset":
                chat.reset()
                pictures.clear()
            elif command == "/image":
                pictures.append(load_picture(rest.strip()))
            elif command.startswith("/"):
                print(HELP, file=sys.stderr)
            elif line:
                _answer(chat, line, pictures, as_json=args.json)
                pictures.clear()
        except UserError as error:  # the conversation goes on
            print(f"maverick: {error}", file=sys.stderr)


def _answer(chat, question: str, pictures: list, *, as_json: bool) -> None:
    answer = ""
    try:
        for portion in chat.stream(question, pictures):
            answer += portion
            if not as_json:
                print(portion, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", file=sys.stderr)
        return
    if as_json:
        print(options.as_json(answer, chat.last), flush=True)
    else:
        print()
        print(options.speed(chat.last), file=sys.stderr)
