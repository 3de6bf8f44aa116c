"""docs/planning.md shows what the commands print. `python tests/plan/test_planning_doc.py` writes it anew."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from maverick_jax.cli.main import main

FILE = Path(__file__).parents[2] / "docs" / "planning.md"
EXAMPLE = re.compile(r"^\$ (maverick plan .*)\n((?:(?!```).*\n)*)", re.MULTILINE)


def printed(command: str) -> str:
    """What a command prints, mistakes included."""
    found = io.StringIO()
    with contextlib.redirect_stdout(found), contextlib.redirect_stderr(found):
        main(shlex.split(command)[1:])
    return found.getvalue()


@pytest.mark.parametrize("command, shown", EXAMPLE.findall(FILE.read_text(encoding="utf-8")))
def test_output_is_what_is_printed(command, shown):
    """A figure that was true last month misleads whoever rents by it."""
    assert shown == printed(command)


def test_there_are_examples():
    assert len(EXAMPLE.findall(FILE.read_text(encoding="utf-8"))) >= 4


if __name__ == "__main__":
    FILE.write_text(EXAMPLE.sub(lambda m: f"$ {m[1]}\n{printed(m[1])}", FILE.read_text(encoding="utf-8")), encoding="utf-8")
