"""Ctrl-C ends every command at any moment with status 130 and one line, and the other processes of its run with it."""

import contextlib
import importlib.util
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from interrupting import INTERRUPT, LATEST_S, LINE, interrupt, interrupt_process

from maverick_jax.cli.main import main

LIMIT_S = 60.0  # for a process to end that was told to
MET = """
import argparse, time
from maverick_jax.cli import interrupt, options
interrupt.watch()
def run(args):
    print("met", flush=True)
    time.sleep(600)
options.on_every_process(run)(argparse.Namespace(run=run))
"""
# Four answers of a command that asks for KeyboardInterrupt: in Python; in Python; twice while something in C keeps the main thread.
ANSWERS = """
import hashlib, threading
from maverick_jax.cli import interrupt
interrupt.watch()
for i in range(2):
    try:
        with interrupt.raised():
            print("asked", flush=True)
            while True:
                pass
    except KeyboardInterrupt:
        print("answered", flush=True)
with interrupt.raised():
    threading.Timer(0.5, lambda: print("busy", flush=True)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000_000)
"""
ENDING = """
import atexit, sys, time
from maverick_jax.cli import interrupt
interrupt.watch()
def last_words():
    print("ending", flush=True)
    time.sleep(600)
atexit.register(last_words)
"""


@contextlib.contextmanager
def python(code: str) -> Iterator[subprocess.Popen]:
    """A process that runs `code` and does not outlive the block."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("name", list(LATEST_S))
@pytest.mark.parametrize("where", list(INTERRUPT))
def test_any_moment(name, where):
    """One here, at a process and at a terminal; tests/cli/interrupting.py tries many."""
    if name == "plan" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    after_s = random.Random(f"{name} {where}").uniform(0, min(LATEST_S[name], 4.0))
    outcome = interrupt(name, where, after_s)
    assert outcome.is_right or (outcome.status == 0 and name == "convert"), (after_s, outcome)  # it may have been done


def test_the_line_says_how_to_go_on(monkeypatch, capfd):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("maverick_jax.convert.convert", stopped)
    monkeypatch.setattr("maverick_jax.cli.interrupt._hint", "")
    assert main(["convert", "from", "to"]) == 130
    assert capfd.readouterr().err == f"{LINE} What is written stays: run the same command again to go on.\n"


def test_a_second_one_changes_nothing():
    """Nor does a third, while the line is printed and the process ends."""
    assert interrupt_process([sys.executable, "-m", "maverick_jax", "chat"], 0.2, times=3).is_right


def test_a_command_may_answer_it_itself():
    """In `raised` it is a KeyboardInterrupt; while C runs the first one waits, and the second ends the process."""
    with python(ANSWERS) as process:
        for _ in range(2):
            assert process.stdout.readline() == "asked\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "answered\n"
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGINT)
        assert not select.select([process.stderr], [], [], 0.5)[0]
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=LIMIT_S) == ("", f"{LINE}\n")
        assert process.returncode == 130


def test_while_the_interpreter_ends():
    with python(ENDING) as process:
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=LIMIT_S) == ("", f"{LINE}\n")
        assert process.returncode == 130


def test_the_other_processes_end_too(start):
    """They wait for each other: nobody may be left behind, and each says why."""
    run = start([("-c", MET)] * 2)
    run.wait_for("met", 0)
    run.processes[1].send_signal(signal.SIGINT)
    assert run.statuses() == [130, 130]
    assert run.one_line(1) == LINE
    assert "process 1 failed: interrupted" in run.one_line(0)


def test_an_output_that_nobody_takes_holds_nothing_up():
    """`maverick … | less`, and less is not read any further: the farewell must not wait for room in the pipe."""
    code = "import sys; from maverick_jax.cli import interrupt; interrupt.watch(); print('x' * 4, flush=True); print('x' * 10**7)"
    with python(code) as process:
        assert os.read(process.stdout.fileno(), 2) == b"xx"
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 130
        assert process.stderr.read() == f"{LINE}\n"


def test_inside_somebodys_process(monkeypatch, capfd):
    """`main` as a function leaves signals and the process alone."""
    before = signal.getsignal(signal.SIGINT)

    def stopped(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("maverick_jax.cli.inspect.run", stopped)
    assert main(["inspect"]) == 130
    assert capfd.readouterr() == ("", f"{LINE}\n")
    assert signal.getsignal(signal.SIGINT) is before


SWALLOWED = """
import gc, signal, time
from maverick_jax.cli import interrupt
interrupt.watch()
signals = iter([signal.SIGINT])
gc.callbacks.append(lambda *_: [signal.raise_signal(number) for number in signals])
try:
    with interrupt.raised():
        gc.collect()
        time.sleep(8)
except KeyboardInterrupt:
    print("raised")
"""


def test_an_interrupt_in_a_callback_of_the_garbage_collector_is_not_lost():
    """jax has such a callback; Python writes a traceback there and goes on."""
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr) == ("raised\n", "")
