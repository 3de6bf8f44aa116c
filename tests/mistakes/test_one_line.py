"""A mistake costs its maker one line: it names the mistake, the status is 2, and nothing is left half-made."""

import os

import pytest
from mistakes.attempt import attempt, everything, read_tables

MISTAKES = read_tables()
AREAS = {"demo", "convert", "verify", "export", "inspect", "generate", "chat", "batch", "serve", "plan", "bench", "check", "tokens"}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("mistakes"))


@pytest.mark.parametrize("mistake", [pytest.param(mistake, id=f"{mistake.table}-{mistake.did}") for mistake in MISTAKES])
def test_one_line(mistake, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = attempt(mistake, names | {"tmp": tmp_path})
    assert (outcome.status, outcome.out, outcome.left) == (mistake.status, "", []), outcome
    assert outcome.err.startswith("maverick: ")
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
    assert not [word for word in mistake.says if word.format_map(names | {"tmp": tmp_path}) not in outcome.err], outcome.err


def test_all_commands_and_python_are_tried():
    """At least two hundred mistakes, ten of each command, told apart by what was done."""
    first_words = [mistake.run.split()[0] for mistake in MISTAKES if mistake.run]
    assert len(MISTAKES) >= 200
    assert not {area for area in AREAS if first_words.count(area) < 5}
    assert sum(bool(mistake.python) for mistake in MISTAKES) >= 50
    assert len({mistake.did for mistake in MISTAKES}) == len(MISTAKES)


def test_an_attempt_puts_the_streams_back(names, tmp_path):
    """What is tried leaves this process as it was."""
    before = (os.fstat(1).st_ino, os.fstat(2).st_ino, dict(os.environ))
    attempt(MISTAKES[0], names | {"tmp": tmp_path})
    assert (os.fstat(1).st_ino, os.fstat(2).st_ino, dict(os.environ)) == before
