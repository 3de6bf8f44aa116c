"""What the user of `maverick chat` types: questions, and commands that begin with a slash."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from maverick_jax.cli import interrupt

PROMPT = "> "
HELP = """/image FILE ...   add pictures to the next question
/reset            forget the conversation
/help             show this
/quit             end, as Ctrl-D does; Ctrl-C stops an answer
//text            a question that begins with a slash"""

Line = tuple[str, str, str]


class Keyboard:
    """Standard input, line by line.

    Attributes:
      at_terminal: somebody sits there.
      draft: a question that waits to be sent again: it stands behind the next prompt.
    """

    def __init__(self):
        self.at_terminal = sys.stdin.isatty()
        self.draft = ""
        if self.at_terminal:
            _put_back_at_ctrl_c()
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # the bytes of a file name need not be UTF-8

    def lines(self) -> Iterator[Line]:
        """(command, value, data) of what concerns the conversation: ("", question, ""), ("/reset", "", "") and, for every picture,
        ("/image", name, its file in base64), because process 0 alone can see the file. The rest is answered here."""
        if self.at_terminal:
            print(HELP, file=sys.stderr)
        while (line := self._read()) is not None:
            command, _, rest = line.partition(" ")
            if line.startswith("//"):
                line, command = line[1:], ""
            if line == "/quit":
                return
            if line == "/help":
                print(HELP, file=sys.stderr)
            elif command == "/image":
                yield from _pictures(rest.strip())
            elif line == "/reset":
                yield line, "", ""
            elif command.startswith("/"):
                _complain(f"{command} is no command: /help lists them, and a question that begins with a slash is written //like this.")
            elif not _is_text(line):
                _complain("this line is not UTF-8: it is left out.")
            elif line:
                yield "", line, ""

    def _read(self) -> str | None:
        """The next line, None at the end of input."""
        try:
            return self._input().strip()
        except EOFError:
            if self.at_terminal:
                print(file=sys.stderr)  # behind the prompt
            return None

    def _input(self) -> str:
        if not self.at_terminal:
            return input()
        if not sys.stdout.isatty():  # the prompt is no part of what goes into a file
            print(PROMPT, end="", file=sys.stderr, flush=True)
            return input()
        try:
            import readline
        except ImportError:  # Windows
            return input(PROMPT)
        draft, self.draft = self.draft, ""
        readline.set_startup_hook(lambda: readline.insert_text(draft))
        try:
            return input(PROMPT)
        finally:
            readline.set_startup_hook()


def _put_back_at_ctrl_c() -> None:
    """readline turns the terminal's echo off while it reads, and Ctrl-C ends the process without asking it."""
    with contextlib.suppress(ImportError):  # Windows
        import termios

        before = termios.tcgetattr(sys.stdin)
        interrupt.before_leaving(lambda: termios.tcsetattr(sys.stdin, termios.TCSANOW, before))


def _pictures(names: str) -> Iterator[Line]:
    """The files of `/image`, written as for a shell; a name with spaces is understood as it is, too."""
    from maverick_jax.errors import UserError
    from maverick_jax.prompt import load_picture

    try:
        files = [names] if os.path.isfile(os.path.expanduser(names)) else shlex.split(names)
    except ValueError as error:  # a quote that is not closed
        _complain(f"/image {names} cannot be understood ({error}): write a backslash before a quote that belongs to a name.")
        return
    if not files:
        _complain("/image takes files: /image dog.jpg 'my cat.png'")
    for name in files:
        file = os.path.expanduser(name)
        try:
            load_picture(file)
            data = Path(file).read_bytes()
        except (UserError, OSError) as error:
            _complain(str(error))
        else:
            yield "/image", name, base64.b64encode(data).decode()


def _is_text(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def _complain(text: str) -> None:
    """A mistake, after which the chat goes on."""
    from maverick_jax.errors import UserError

    print(f"maverick: {UserError(text)}", file=sys.stderr)
