"""Standard streams that are closed, full or of a poor encoding cost one line, or nothing at all."""

import io
import os
import subprocess
import sys

import pytest

from maverick_jax.assets import mini_directory
from maverick_jax.cli import streams

MAVERICK = f"{sys.executable} -m maverick_jax"
FULL = os.path.exists("/dev/full")


def shell(command: str, **environment: str) -> tuple[int, str, str]:
    """Status, standard output and error of a line for the shell, in which `maverick` is ours."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))} | environment
    ended = subprocess.run(["bash", "-c", command.replace("maverick ", f"{MAVERICK} ")], env=variables, capture_output=True, timeout=120)
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


@pytest.mark.skipif(not FULL, reason="this system has no /dev/full")
@pytest.mark.parametrize("command", ["--help", "--version", "inspect"])
def test_a_full_disk(command):
    assert shell(f"maverick {command} > /dev/full") == (2, "", "maverick: standard output: no space left on device.\n")


@pytest.mark.parametrize(
    "command, ended",
    [
        pytest.param("maverick --help > /dev/full 2> /dev/full", (2, "", ""), marks=pytest.mark.skipif(not FULL, reason="no /dev/full")),
        pytest.param("maverick fly 2> /dev/full", (2, "", ""), marks=pytest.mark.skipif(not FULL, reason="no /dev/full")),
        ("maverick --version 2>&-", (0, "maverick-jax 0.1.0\n", "")),
        ("maverick fly 2>&-", (2, "", "")),
        ("maverick --version <&-", (0, "maverick-jax 0.1.0\n", "")),
        ("maverick generate - <&-", (2, "", "maverick: the prompt is empty: ask something.\n")),
        ("maverick help generate | head -c 5; test ${PIPESTATUS[0]} = 0", (0, "usage", "")),
    ],
)  # fmt: skip
def test_other_streams(command, ended):
    """Nothing of an error reaches standard output, no file gets a closed stream's number, a reader that has enough is no error."""
    assert shell(command) == ended


def test_no_output_is_no_place_to_work_for():
    status, _, error = shell("maverick --version >&-")
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("maverick: standard output is closed")


def test_characters_that_the_output_lacks_are_escaped(tmp_path):
    """A file's name is told also where it cannot be shown."""
    command = f"maverick convert {mini_directory()} {tmp_path}/größe --quiet"
    assert shell(command, PYTHONIOENCODING="ascii") == (0, f"{tmp_path}/gr\\xf6\\xdfe\n", "")


@pytest.mark.parametrize("data, encoding, word", [(b"a\xff", "utf-8", "0xff at 1"), ("né".encode(), "ascii", "0xc3 at 1")])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_input_that_is_no_text(maverick, monkeypatch, data, encoding, errors, word):
    """Python's way with strange bytes depends on the locale; ours does not."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding, errors))
    result = maverick("generate", "-")
    assert (result.status, result.out) == (2, "")
    assert result.err == f"maverick: standard input is no {encoding}: byte {word}.\n"


@pytest.mark.parametrize(
    "error, line",
    [
        (PermissionError(13, "Permission denied", "there/config.json"), "there/config.json: permission denied."),
        (OSError(28, "No space left on device"), "no space left on device."),
        (FileNotFoundError(2, "No such file or directory", b"gr\xc3\xb6\xc3\x9fe"), "größe: no such file or directory."),
        (TimeoutError("the lock was not free"), "the lock was not free."),
        (ConnectionResetError(), "connectionResetError."),
    ],
)
def test_what_the_system_refuses_is_one_line(maverick, monkeypatch, error, line):
    """Anywhere in a command: nobody can think of every file that may be forbidden."""
    assert streams.reason(error) == line

    def refused(args):
        raise error

    monkeypatch.setattr("maverick_jax.cli.inspect.run", refused)
    assert maverick("inspect").err == f"maverick: {line}\n"
    with pytest.raises(type(error)):
        maverick("inspect", "--debug")
