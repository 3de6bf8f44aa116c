"""The notebooks run from top to bottom, and the two forms of each hold the same."""

import importlib
import os
import re
from pathlib import Path

import jupytext
import nbclient
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
ROUNDING = 0.125  # of one bfloat16 between 16 and 32, where the largest results lie


def answers_right(texts):
    answer, expected = texts.splitlines()[-2:]
    assert expected == f"expected: {answer}"


def dispatchers_agree(texts):
    found = re.findall(r"^(\w+) +difference = (\S+) +dropped = (\d+)$", texts, re.MULTILINE)
    assert [name for name, _, _ in found] == ["Local", "AllToAll", "Ragged"]
    assert all(float(difference) <= ROUNDING and dropped == "0" for _, difference, dropped in found)


def port_is_exact(texts):
    assert "all as it was written" in texts
    relative = [float(line.split()[-2 if line.endswith("%") else -1]) for line in re.findall(r"^layer \d+ .*\S", texts, re.MULTILINE)]
    assert len(relative) == 8
    assert max(relative) < 1e-4
    assert "missing: 0  unexpected: 0" in texts
    assert "tensors that differ: 0 of 145" in texts


def company_changes_nothing(texts):
    assert "requests that say something else alone: 0" in texts
    assert "cancelled" in texts
    known = re.search(r"tokens that were there: 0 for the first, (\d+) of (\d+) for the second", texts)
    assert known is not None
    assert int(known[1]) > 0.9 * int(known[2])
    assert len(re.findall(r"[1-9]\d* of \d+ tokens accepted", texts)) == 2


def stages_are_compared(texts):
    """Of a pipeline that is too small to conclude anything from."""
    assert re.search(r"^filter: \d+ of 40 questions are hard, \d+ of 40 are open$", texts, re.MULTILINE)
    assert len(re.findall(r"^(base|sft random|sft|rl unfiltered|rl|dpo)( +\d+\.\d){6}$", texts, re.MULTILINE)) == 6
    assert len(re.findall(r"^(sft|rl|dpo) .* \d+ : \d+ .*(better|worse|no difference)$", texts, re.MULTILINE)) == 6
    advantages = [float(number) for number in re.findall(r"advantage (\S+)", texts)]
    assert len(advantages) == 8
    assert abs(sum(advantages)) < 0.05


SMALL = "Settings(held_out=10, tries=5, pool=80, group=4, epochs=0.1, rows=4, rl_seconds=0, prompts=4, preferred=10, slots=16)"
INSTEAD = {"05_post_training": ("settings = Settings()", f"settings = {SMALL}")}  # of minutes

CHECKS = {
    "01_quickstart": answers_right,
    "02_expert_parallelism": dispatchers_agree,
    "03_port_a_checkpoint": port_is_exact,
    "04_serving_many": company_changes_nothing,
    "05_post_training": stages_are_compared,
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_source_and_notebook_agree(source):
    """A reader of the ipynb sees what the reviewed source says."""
    written, paired = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
    assert [cell.source for cell in paired.cells] == [cell.source for cell in written.cells]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # of the kernel's own libraries
def test_notebook_runs(source, monkeypatch):
    """In a kernel of its own, which simulates the devices it asks for."""
    if "import torch\n" in source.read_text(encoding="utf-8"):
        importlib.import_module("torch")  # here its absence is a reason to skip; in the kernel it would be an error
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = jupytext.read(source)
    if source.stem in INSTEAD:
        before, after = INSTEAD[source.stem]
        (cell,) = (cell for cell in notebook.cells if before in cell.source)
        cell.source = cell.source.replace(before, after)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    texts = "".join(output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    CHECKS[source.stem](texts)
