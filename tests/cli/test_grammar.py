"""The command line's grammar: help in all the ways that people ask for it, mistakes that say where to look, completion."""

import os
import subprocess
import sys

import pytest

from maverick_jax import __main__
from maverick_jax.cli.main import COMMANDS


@pytest.mark.parametrize("arguments", [(), ("help",), ("--help",), ("-h",), ("help", "--help")])
def test_help(maverick, arguments):
    """Bare `maverick` too: whoever types it wants to know what there is."""
    result = maverick(*arguments)
    assert (result.status, result.err) == (0, "")
    assert not [command for command in COMMANDS if f"\n    {command}  " not in result.out]


def test_help_about_a_command(maverick):
    assert maverick("help", "generate") == maverick("generate", "--help")
    assert "maverick help COMMAND" in maverick("--help").out


@pytest.mark.parametrize(
    "arguments, line",
    [
        ("genrate hi", "'genrate' is no command: did you mean generate? (maverick --help)."),
        ("help genrate", "'genrate' is no command: did you mean generate? (maverick --help)."),
        ("--vers", "--vers is unknown: did you mean --version? (maverick --help)."),
        ("--", "-- is unknown (maverick --help)."),
        ("generate hi --temprature 1", "--temprature is unknown: did you mean --temperature? (maverick generate --help)."),
        ("generate hi --temp 1", "--temp is unknown: did you mean --temperature? (maverick generate --help)."),
        ("generate hi --temp=1", "--temp is unknown: did you mean --temperature? (maverick generate --help)."),
        ("generate hi there", "'there' is one word too many (maverick generate --help)."),
        ("generate", "the following arguments are required: PROMPT (maverick generate --help)."),
        ("generate hi --top-k 2.7", "--top-k: '2.7' is no whole number (maverick generate --help)."),
        ("generate hi --seed", "--seed: expected one argument (maverick generate --help)."),
        ("convert a b --workers 0", "--workers: '0' is not a number of 1 or more (maverick convert --help)."),
    ],
)  # fmt: skip
def test_a_mistake_says_where_to_look(maverick, arguments, line):
    result = maverick(*arguments.split())
    assert (result.status, result.out, result.err) == (2, "", f"maverick: {line}\n")


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e400", "", "0,7", "x" * 10_000])
def test_a_number_is_finite(maverick, value):
    result = maverick("generate", "hi", f"--temperature={value}")
    assert result.status == 2
    assert result.err.startswith("maverick: --temperature: ")
    assert len(result.err) < 140


def options_with_values() -> list[tuple[str, str]]:
    from maverick_jax.cli.main import make_parser

    commands = make_parser()._subparsers._group_actions[0].choices
    return [
        (name, action.option_strings[-1])
        for name, parser in commands.items()
        for action in parser._actions
        if action.option_strings and action.nargs != 0 and action.option_strings[-1] != "--compilation-cache"
    ]


@pytest.mark.parametrize("command, option", options_with_values())
def test_no_value_is_empty(maverick, command, option):
    """A shell's variable that is not set becomes an empty word; of every option of every command."""
    result = maverick(command, option, "")
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert option in result.err


def complete(line: str) -> set[str]:
    """What the shell is told may come at the end of `line`: asked of the module as the shell asks it."""
    read, write = os.pipe()
    environment = os.environ | {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    code = f"import os, sys; os.dup2({write}, 8); sys.argv = ['maverick']; from maverick_jax.__main__ import main; main()"
    subprocess.run([sys.executable, "-c", code], env=environment, pass_fds=[write], check=True, timeout=60)
    os.close(write)
    with open(read) as stream:
        return {word.strip() for word in stream.read().split("\n")} - {""}


def test_the_tab_key(tmp_path, monkeypatch):
    """Commands, options and files."""
    assert complete("maverick gen") == {"generate"}
    assert complete("maverick generate --temp") == {"--temperature"}
    assert complete("maverick generate --dtype bf") == {"bfloat16"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").touch()
    assert complete("maverick generate --image pic") == {"picture.png"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_completion_scripts(maverick, shell):
    result = maverick("completion", shell)
    assert result.status == 0
    assert "maverick" in result.out
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=result.out, text=True, check=True)


def test_as_a_module():
    """`python -m maverick_jax` is the same command, and its help needs no jax."""
    code = "import sys; from maverick_jax.__main__ import main; status = main(); assert 'jax' not in sys.modules; sys.exit(status)"
    for words in (["-m", "maverick_jax"], ["-c", code]):
        ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, timeout=60)
        assert ended.stdout.startswith("usage: maverick [-h]")
    assert callable(__main__.main)
