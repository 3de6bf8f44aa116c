"""`maverick chat` at a terminal: what its keys do, and what the terminal is spared."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time

import pytest
from PIL import Image

from processes import soon

# The command as a process of its own, with a model that says what the test wants. It waits as a computation does.
CHAT = r"""
import os, sys, time
os.login_tty(0)
sys.argv[1:] = ["chat", "--mesh", "data=1"]
from oracle import scripted
from maverick_jax.cli import options
from maverick_jax.inference import chat
def endless(*parts):
    yield from parts
    print("[computing]", file=sys.stderr)
    time.sleep(1000)
scripted.Scripted.seen = []
scripted.Scripted.answers = [endless(), endless("one ", "two "), lambda prompt: f"\x1b[31m{prompt}\r\n\u202e"]
chat.engine_for = scripted.Scripted
options.load_model = lambda args: scripted.Model()
from maverick_jax.__main__ import main
sys.exit(main())
"""


class Terminal:
    """A process that sits at a pseudo-terminal."""

    def __init__(self, folder):
        main, child = pty.openpty()
        tests = os.path.dirname(os.path.dirname(__file__))
        env = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(tests), tests]), "TERM": "dumb", "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen([sys.executable, "-c", CHAT], stdin=child, stdout=child, stderr=child, cwd=folder, env=env)
        os.close(child)
        self.screen, self.main = "", main

    def until(self, pattern: str) -> str:
        """What appeared up to `pattern`, taken from the screen."""
        end = soon()
        while not (found := re.search(pattern, self.screen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.screen!r}"
            if select.select([self.main], [], [], 0.2)[0]:
                try:
                    self.screen += os.read(self.main, 65536).decode()
                except OSError:  # the other end is closed
                    assert re.search(pattern, self.screen), f"no {pattern!r} in {self.screen!r}"
        self.screen = self.screen[found.end() :]
        return found.string[: found.end()]

    def type(self, keys: str) -> None:
        os.write(self.main, keys.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.main)


@pytest.fixture
def terminal(tmp_path):
    Image.new("RGB", (60, 32)).save(tmp_path / "my red.png")
    found = Terminal(tmp_path)
    yield found
    found.close()


CTRL_C, CTRL_D = "\x03", "\x04"


def test_a_conversation(terminal):
    """Ctrl-C stops an answer and loses nothing; escape sequences are shown, not obeyed; Ctrl-D leaves the shell a line of its own."""
    terminal.until("> ")
    terminal.type("/image 'my red.png'\n")
    terminal.until(r"my red.png: 60 x 32 pixels, 3 tiles \(1 x 2 and the whole picture\), \d+ tokens\r\n> ")
    terminal.type("What colour?\n")
    terminal.until(r"\[computing\]")
    terminal.type(CTRL_C)  # before the first word
    terminal.until(r"\[stopped; nothing was said, so the question waits\]\r\n> What colour\?")
    terminal.type("\n")
    terminal.until(r"one two \[computing\]")
    terminal.type(CTRL_C)
    terminal.until(r"\r\n\[stopped; what was said stays\]\r\n(.*\r\n)?> ")
    terminal.type("//path\n")
    shown = terminal.until(r"\\r\r\n\\u202e\r\n.*new tokens.*\r\n> ")
    assert "\\x1b[31m" in shown
    assert "\x1b[31m" not in shown
    assert "What colour?" in shown
    assert "one two " in shown
    assert "/path" in shown
    assert "//path" not in shown.split("\n", 1)[1]
    terminal.type(CTRL_D)
    terminal.until("\r\n")
    assert terminal.process.wait(60) == 0


def test_ctrl_c_at_the_prompt(terminal):
    """It ends the chat, and the shell's prompt gets a terminal that echoes."""
    before = termios.tcgetattr(terminal.main)
    terminal.until("> ")
    terminal.type("half a question" + CTRL_C)
    terminal.until(r"\r\nmaverick: interrupted\.\r\n")
    assert terminal.process.wait(60) == 130
    assert termios.tcgetattr(terminal.main) == before
