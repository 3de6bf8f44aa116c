"""What the README and the package's description say is there."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from maverick_jax.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("line", re.findall(r"^maverick .*", README, re.MULTILINE))
def test_commands_are_understood(line):
    """A flag that was renamed must not live on in the README."""
    assert callable(main._parser().parse_args(shlex.split(line, comments=True)[1:]).run)


def test_every_extra_has_its_install_line():
    assert set(re.findall(r"'\.\[(\w+)\]'", README)) == set(PROJECT["project"]["optional-dependencies"])
