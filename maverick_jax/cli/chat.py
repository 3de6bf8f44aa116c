"""Talk with a model. Commands inside: /image FILE ... adds pictures to the next question, /reset forgets the conversation,
/help lists the commands, /quit (or end of input) ends the chat. A question that begins with a slash is written with two.

Ctrl-C stops an answer, of which the conversation keeps what was said; at the prompt it ends the chat. In a run of several
processes, and where standard input is no terminal, it always does. To a terminal control characters of an answer are written
out (\\x1b); a file or a pipe gets the answer as it is.

examples:
  maverick chat
  maverick chat -m maverick --mesh expert=8 --temperature 0.6 --top-p 0.9
"""

from __future__ import annotations

import argparse
import base64
import contextlib
from typing import TYPE_CHECKING

from maverick_jax.cli import compilation, interrupt, options
from maverick_jax.cli.terminal.answers import receive
from maverick_jax.cli.terminal.keyboard import Keyboard

if TYPE_CHECKING:
    from maverick_jax.inference.chat import Chat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_arguments(parser)
    options.add_adapter_argument(parser)
    options.add_sampling_arguments(parser)
    compilation.add_argument(parser)


@options.on_every_process
@compilation.programs_kept
def run(args: argparse.Namespace) -> int:
    from maverick_jax.errors import UserError
    from maverick_jax.inference.chat import Chat
    from maverick_jax.inference.checks import NoRoom
    from maverick_jax.sharding import multihost

    chat = Chat(options.load_model(args), **options.chat_options(args))
    keyboard = Keyboard()
    pictures: list = []  # of the next question
    for command, value, data in multihost.from_first(keyboard.lines()):
        try:
            if command == "/reset":
                chat.reset()
                pictures.clear()
            elif command == "/image":
                pictures.append(_attach(chat, value, base64.b64decode(data)))
            elif _answer(chat, value, pictures, stoppable=keyboard.at_terminal and multihost.process_count() == 1, as_json=args.json):
                pictures.clear()
            else:
                keyboard.draft = value
        except NoRoom as error:
            options.note(f"maverick: {error} /reset forgets what was said so far; --max-new-tokens asks for shorter answers.")
        except UserError as error:  # the conversation goes on
            options.note(f"maverick: {error}")
    return 0


def _attach(chat: Chat, name: str, data: bytes) -> tuple:
    """The tiles of a picture; says what it takes."""
    from maverick_jax.errors import UserError
    from maverick_jax.prompt import load_picture, tile_image
    from maverick_jax.prompt.chat import image_tokens

    vision = chat.model.config.vision
    if vision is None:
        raise UserError("this checkpoint has no vision tower: it takes text only.")
    picture = load_picture(data)
    tiles, (rows, columns) = tile_image(picture, vision)
    cut = "1 tile" if len(tiles) == 1 else f"{len(tiles)} tiles ({rows} x {columns} and the whole picture)"
    tokens = len(image_tokens(rows, columns, vision.tokens_per_tile, chat.tokenizer))
    options.note(f"{name}: {picture.width} x {picture.height} pixels, {cut}, {tokens:,} tokens")
    return tiles, (rows, columns)


def _answer(chat: Chat, question: str, pictures: list, *, stoppable: bool, as_json: bool) -> bool:
    """Whether the question is part of the conversation now: not if it was stopped before the answer's first word."""
    known = len(chat.messages)
    try:
        with interrupt.raised() if stoppable else contextlib.nullcontext(), contextlib.closing(chat.stream(question, pictures)) as portions:
            answer = receive(portions, show=not as_json)
    except KeyboardInterrupt:
        if not stoppable:
            raise
        kept = len(chat.messages) > known
        options.note("[stopped; what was said stays]" if kept else "[stopped; nothing was said, so the question waits]")
        if not kept:
            return False
        answer = chat.messages[-1]["content"]
    assert chat.last is not None
    if as_json:
        print(options.as_json(answer, chat.last), flush=True)
    else:
        options.note(options.speed(chat.last))
    return True
