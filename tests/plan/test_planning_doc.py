"""docs/planning.md and docs/recipes.md show what the commands print. `python tests/plan/test_planning_doc.py` writes them anew."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from maverick_jax.cli.main import main

DOCS = Path(__file__).parents[2] / "docs"
FILES = {"planning.md": 7, "recipes.md": 9}  # and how many examples there are at least
EXAMPLE = re.compile(r"^\$ (maverick plan .*)\n((?:(?!```|\$ ).*\n)*)", re.MULTILINE)


def printed(command: str) -> str:
    """What a command prints, mistakes included; behind `| grep -E` the lines that match."""
    command, _, pattern = command.partition(" | grep -E ")
    found = io.StringIO()
    with contextlib.redirect_stdout(found), contextlib.redirect_stderr(found):
        main(shlex.split(command)[1:])
    pattern = shlex.split(pattern)[0] if pattern else ""
    return "".join(line for line in found.getvalue().splitlines(keepends=True) if re.search(pattern, line))


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("command, shown", [example for name in FILES for example in EXAMPLE.findall(text(name))])
def test_output_is_what_is_printed(command, shown):
    """A figure that was true last month misleads whoever rents by it."""
    assert shown == printed(command)


@pytest.mark.parametrize("name", FILES)
def test_there_are_examples(name):
    assert len(EXAMPLE.findall(text(name))) >= FILES[name]


if __name__ == "__main__":
    for name in FILES:
        (DOCS / name).write_text(EXAMPLE.sub(lambda m: f"$ {m[1]}\n{printed(m[1])}", text(name)), encoding="utf-8")
