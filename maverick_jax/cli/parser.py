"""How the command line is read: every mistake in it is one line, which names the argument and where to look."""

from __future__ import annotations

import argparse
import difflib
import importlib
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from maverick_jax.cli.streams import strange_byte
from maverick_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """As argparse's, but options are written in full, a value is never empty, and a mistake is a `UserError`."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        if settings.get("action", "store") in ("store", "append"):
            settings.setdefault("type", given)
        return super().add_argument(*names, **settings)

    def parse_known_args(self, *args, **settings):  # every command's parser is asked by this method
        found, unknown = super().parse_known_args(*args, **settings)
        if unknown:
            option = unknown[0].partition("=")[0]
            options = [text for action in self._actions for text in action.option_strings]
            self.error(f"{option} is unknown{_meant(option, options)}" if option.startswith("-") else f"{option!r} is one word too many")
        return found, unknown

    def _print_message(self, message: str, file: Any = None) -> None:  # argparse's own is silent where nothing can be printed
        print(message, end="", file=file)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} ({self.prog} --help).")


def add_commands(commands: Any, package: str, summaries: Mapping[str, str], entry: str) -> None:
    """A parser for every command of a package: the module's docstring is its help; its `run` is kept under the name `entry`."""
    for name, summary in summaries.items():
        module = importlib.import_module(f"{package}.{name}")
        sub = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(**{entry: module.run})


def refuse_unknown(command: str, commands: list[str]) -> None:
    """
    Raises:
      UserError: there is no such command; names the one that was probably meant.
    """
    if command not in commands:
        raise UserError(f"{command!r} is no command{_meant(command, commands) or ': there are ' + ', '.join(commands)} (maverick --help).")


def _meant(word: str, known: list[str]) -> str:
    near = [text for text in known if len(word) > 2 and text.startswith(word)] or difflib.get_close_matches(word, known, 1)
    return f": did you mean {near[0]}?" if near else ""


def given(text: str) -> str:
    """An argument that is there: a shell's unset variable is an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def words(text: str) -> str:
    """Something to be read, not a file's name, whose bytes may be any."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"it is no UTF-8: {strange_byte(error)}") from None
    return text


def given_words(text: str) -> str:
    """`words` that are there."""
    return words(given(text))


def whole(text: str) -> int:
    """An argument that is a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{_short(text)} is no whole number") from None


def positive(text: str) -> int:
    """An argument that counts something."""
    if whole(text) < 1:
        raise argparse.ArgumentTypeError(f"{_short(text)} is not a number of 1 or more")
    return int(text)


def real(text: str) -> float:
    """An argument that is a number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{_short(text)} is no number, or not a finite one")
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}…")
