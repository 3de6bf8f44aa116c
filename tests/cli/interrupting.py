"""Ctrl-C at a moment that nobody chose: commands are started, as plain processes and at a pseudo-terminal, and interrupted.

Run as a script, it interrupts every command at many moments and counts what came of it.

examples:
  python tests/cli/interrupting.py
  python tests/cli/interrupting.py --moments 5 generate chat
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from maverick_jax.assets import mini_directory
from maverick_jax.config import Config

MAVERICK = (sys.executable, "-m", "maverick_jax")
LINE = "maverick: interrupted."
NOISE = ("Traceback", "Exception", "Error", "Fatal", "Segmentation", "terminate called")
TAKE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
HARD_LIMIT_S = 120.0
LATEST_S = {"generate": 9.0, "convert": 2.5, "plan": 9.0, "chat": 11.0}  # after the start: about where each ends, compiling anew


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said: on standard error, or at the terminal."""

    status: int
    said: str

    @property
    def is_right(self) -> bool:
        """Status 130 and the one line; nothing that nobody wants to read."""
        return self.status == 130 and self.said.count(LINE) == 1 and not any(word in self.said for word in NOISE)


def command(name: str, folder: Path) -> list[str]:
    """One that computes long enough to be interrupted; what it makes lies in `folder`."""
    match name:
        case "generate":
            return [*MAVERICK, "generate", "What is the sum?", "--compilation-cache", "none"]
        case "convert":
            return [*MAVERICK, "convert", str(mini_directory()), str(folder / "out")]
        case "chat":
            return [*MAVERICK, "chat", "--compilation-cache", "none"]
    text = dataclasses.replace(Config.maverick().text, num_hidden_layers=2, moe_layers=(1,), nope_layers=(), vocab_size=1024)
    config = dataclasses.replace(Config.maverick(), text=text, vision=None)
    (folder / "config.json").write_text(json.dumps(config.to_huggingface()))
    topology = "--topology v6e:2x2 --mesh expert=4 --batch 8 --context 1024"
    return [*MAVERICK, "plan", "-m", str(folder), *topology.split(), "--compile"]


def heed_the_signal() -> None:
    """A shell's background job ignores SIGINT, and so would all that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt_process(words: list[str], after_s: float, times: int = 1, typed: bytes = b"") -> Outcome:
    """Signals to a process that has no terminal; standard input stays open behind what is typed."""
    with tempfile.TemporaryFile() as err:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=err)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process:
            process.stdin.write(typed)
            process.stdin.flush()
            _wait_for_our_code(process.pid)
            time.sleep(after_s)
            for _ in range(times):
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
            _outlive(process)
        err.seek(0)
        return Outcome(process.returncode, err.read().decode())


def _outlive(process: subprocess.Popen) -> None:
    try:
        process.wait(HARD_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def interrupt_at_terminal(words: list[str], after_s: float, times: int = 1, typed: bytes = b"") -> Outcome:
    """The key itself, at a terminal of the command's own."""
    terminal, theirs = pty.openpty()
    start = [sys.executable, "-c", TAKE_TERMINAL, *words]
    process = subprocess.Popen(start, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    os.write(terminal, typed)
    said = bytearray()
    _wait_for_our_code(process.pid)
    _listen(terminal, said, after_s)
    for _ in range(times):
        with contextlib.suppress(OSError):
            os.write(terminal, b"\x03")
        _listen(terminal, said, 0.2)
    if _listen(terminal, said, HARD_LIMIT_S):
        process.kill()
    os.close(terminal)
    return Outcome(process.wait(), said.decode(errors="replace"))


def _listen(terminal: int, said: bytearray, seconds: float) -> bool:
    """Take what is said until then. Whether there is still somebody who could say more."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            try:
                heard = os.read(terminal, 1 << 16)
            except OSError:  # the other end is closed
                return False
            said += heard
    return True


def _wait_for_our_code(pid: int) -> None:
    """Before it runs, Python itself answers. The thread that answers then is the process's second."""
    tasks = Path(f"/proc/{pid}/task")
    while tasks.exists() and len(list(tasks.iterdir())) < 2:
        time.sleep(0.001)


INTERRUPT = {"process": interrupt_process, "terminal": interrupt_at_terminal}


def interrupt(name: str, where: str, after_s: float) -> Outcome:
    """One command, once. A chat answers the first Ctrl-C itself while it speaks, so it gets several, and a question."""
    with tempfile.TemporaryDirectory() as folder:
        words = command(name, Path(folder))
        if name == "chat":
            return INTERRUPT[where](words, after_s, times=3, typed=b"What is the sum?\nAnd the difference?\n")
        return INTERRUPT[where](words, after_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="COMMAND", help=f"{', '.join(LATEST_S)} (default: all)")
    parser.add_argument("--moments", type=int, default=20, metavar="N", help="of each, in each of the two ways (default: 20)")
    args = parser.parse_args()
    heed_the_signal()
    wrong = 0
    for name in args.names or LATEST_S:
        if name == "plan" and importlib.util.find_spec("libtpu") is None:
            print("plan --compile: not tried, libtpu is not installed")
            continue
        for where in INTERRUPT:
            moments = random.Random(f"{name} {where}")
            outcomes = {}
            while len(outcomes) < args.moments:
                after_s = moments.uniform(0, LATEST_S[name])
                outcome = interrupt(name, where, after_s)
                if outcome.status != 0:  # else it had ended by itself
                    outcomes[after_s] = outcome
            bad = {after_s: outcome for after_s, outcome in outcomes.items() if not outcome.is_right}
            print(f"{name:9} {where:9} {args.moments - len(bad)} of {args.moments} ended with 130 and one line", flush=True)
            for after_s, outcome in bad.items():
                print(f"  after {after_s:.3f} s: status {outcome.status}, {outcome.said!r}")
            wrong += len(bad)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
