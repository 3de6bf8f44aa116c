"""The house can be read as a map: no folder is a heap, every file says what it is about, and the README names each room."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST = 24  # entries of a folder that a reader still takes in
PACKAGES = ("maverick_jax", "sharding", "convert")


def tracked() -> list[Path]:
    """Files of the checkout, relative to it."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout, so which files belong to it is unknown")
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).exists()]


def test_no_folder_is_a_heap():
    """Nobody looks through thirty doors."""
    entries = {}
    for file in tracked():
        for folder, entry in zip(file.parents, [file, *file.parents], strict=False):
            entries.setdefault(folder, set()).add(entry.name)
    assert not {str(folder): len(names) for folder, names in entries.items() if len(names) > MOST}


def test_tests_have_names_of_their_own():
    """Two files of one name, in folders that are no packages, are one module to pytest, which then collects the first alone."""
    names = [path.name for path in tracked() if path.name.startswith("test_")]
    assert {name for name in names if names.count(name) > 1} == set()


def test_every_file_says_what_it_is_about():
    """In the first line, in words, and not in the words of another file."""
    openings: dict[str, Path] = {}
    for file in tracked():
        if file.suffix == ".py" and (ROOT / file).read_text(encoding="utf-8").strip():
            if file.parts[0] == "notebooks":
                continue  # they begin with their title, in Markdown
            opening = (ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or "").partition("\n")[0]
            assert len(opening) > 20, f"{file} opens with {opening!r}"
            assert opening not in openings, f"{file} and {openings[opening]} open alike"
            openings[opening] = file


def test_the_map_names_every_room():
    """README's Layout has a line for each package, and nothing that is not there."""
    layout = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Layout")[2].partition("\n## ")[0]
    rooms = {file.parent for file in tracked() if file.suffix == ".py" and file.parts[0] in PACKAGES} - {Path("maverick_jax")}
    cells = [line.split("|")[1] for line in layout.splitlines() if line.startswith("| `")]
    named = {name.rstrip("/") for cell in cells for name in cell.split("`")[1::2]}
    assert not {str(room) for room in rooms} - named
    assert not {name for name in named if not (ROOT / name).exists()}
