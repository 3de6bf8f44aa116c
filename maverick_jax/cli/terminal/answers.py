"""A model's words on their way to the user: as they are into files and pipes, without control characters to a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from maverick_jax.cli import status

# Escape sequences, carriage return, backspace, bell, those of C1, and what turns the direction of writing.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    r"""The text with control characters written out, such as `\x1b`; line breaks and tabs stay.

    A model says what a stranger's document made it say: the terminal's title, colours and cursor are none of its business.
    """
    return CONTROL.sub(lambda match: ascii(match.group())[1:-1], text)


def receive(portions: Iterable[str], *, show: bool = True) -> str:
    """The whole answer, as it was said. It is printed as it comes, with a line break at its end, whatever ends it, unless `show` is
    off."""
    shown = harmless if sys.stdout.isatty() else str
    answer = ""
    try:
        for portion in status.awaited("computing", portions):
            answer += portion
            if show:
                print(shown(portion), end="", flush=True)
    except BaseException:
        if show and answer:
            print(flush=True)
        raise
    if show:
        print(flush=True)
    return answer
