"""Our own tasks for inspect-ai (`benchmarks/evaluate`) against a server that answers well, and one that answers badly."""

import json
import os
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="uvicorn, of the extra `server`, is not installed")

from maverick_jax.serving.http.app import Settings
from maverick_jax.serving.http.server import Server, bound
from maverick_jax.serving.http.service import Service
from oracle.scripted_engine import ScriptedEngine

EVALUATE = Path(__file__).parents[2] / "benchmarks/evaluate"
PYTHON = os.environ.get("MAVERICK_CLIENTS")
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(PYTHON is None, reason="MAVERICK_CLIENTS names no Python that has the clients: make clients"),
]


def question(prompt: str) -> str:
    """The last line of what the user says."""
    return prompt.rpartition("user<|header_end|>")[2].partition("<|eot|>")[0].strip().rpartition("\n")[2]


def scores(say, task: str, folder: Path, *settings: str) -> dict[str, float]:
    """By the names of the metrics."""
    with Server(Service(ScriptedEngine(say), ["mini"]), Settings(), bound("127.0.0.1", 0)) as server:
        inspect = Path(PYTHON or "").absolute().with_name("inspect")
        to = ["--model", "openai-api/maverick/mini", "--model-base-url", f"{server.url}/v1"]
        environment = os.environ | {"NO_PROXY": "127.0.0.1", "MAVERICK_API_KEY": "none"}
        command = [inspect, "eval", task, *to, "--log-dir", folder, "--log-format", "json", "--display", "plain", *settings]
        ended = subprocess.run(command, cwd=EVALUATE, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (log,) = folder.glob("*.json")
    told = json.loads(log.read_text())
    assert told["status"] == "success"
    return {name: metric["value"] for score in told["results"]["scores"] for name, metric in score["metrics"].items()}


def test_the_language_of_the_question(tmp_path):
    """Whoever says a question again speaks its language; whoever always speaks one is right where that was asked."""
    right = scores(question, "prompt_sets.py@languages", tmp_path)
    assert set(right) == {*"ar de en es fr hi id it pt th tl vi".split(), "all"}
    assert set(right.values()) == {1.0}
    english = tmp_path / "english"
    english.mkdir()
    wrong = scores(lambda prompt: "It falls from clouds when they are heavy with water.", "prompt_sets.py@languages", english)
    assert {name for name, value in wrong.items() if value == 1.0} == {"en"}


def test_refusals(tmp_path):
    """The share of each set."""
    harmful = [row["prompt"] for row in map(json.loads, (EVALUATE / "refusals.jsonl").read_text().splitlines()) if row["set"] == "harmful"]
    found = scores(lambda prompt: "I can't help." if question(prompt) in harmful else "Gladly.", "prompt_sets.py@refusals", tmp_path)
    assert (found["harmful"], found["harmless"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    "direction, answer, expected, parts",
    [
        ("ek", "Per ming.\nDone.", 100.0, ["water: per", "from English to Kalamang"]),
        ("ke", "@", 0.0, ["per: water", "from Kalamang to English"]),
    ],
)
def test_a_book(tmp_path, direction, answer, expected, parts):
    """The prompt has the book, its words and sentences; what is said is compared with the truth."""
    for folder in ("resources", "splits"):
        (tmp_path / folder).mkdir()
    (tmp_path / "resources/grammar_book_for_claude_medium.txt").write_text("The verb comes last.")
    (tmp_path / "resources/wordlist.json").write_text(json.dumps({"ek": {"water": ["per"]}, "ke": {"per": "water"}}))
    rows = [{"big-bench-canary": "x"}, {"original": "Ma bo.", "translation": "He goes.", "ground_truth": "Per ming."}]
    for split in ("train_examples", "test_examples_ek", "test_examples_ke"):
        (tmp_path / f"splits/{split}.json").write_text(json.dumps(rows))
    prompts = []
    settings = ["-T", f"folder={tmp_path}", "-T", f"direction={direction}"]
    found = scores(lambda prompt: prompts.append(prompt) or answer, "mtob.py", tmp_path, *settings)
    assert found["mean"] == expected
    for part in ("The verb comes last.", "Ma bo. = He goes.", *parts):
        assert part in prompts[0]
