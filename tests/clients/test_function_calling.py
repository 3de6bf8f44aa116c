"""The functions of the Berkeley Function-Calling Leaderboard: thousands of signatures and their right calls, written, cut and read."""

import json
import os
import zipfile
from pathlib import Path

import pytest

from maverick_jax.serving.tools.choice import Function
from oracle.tool_calls import WRITERS, read

DATA = "bfcl_eval/data/BFCL_v4_{}.json"
KINDS = "simple_python simple_java simple_javascript multiple parallel parallel_multiple".split()
KINDS += "live_simple live_multiple live_parallel live_parallel_multiple".split()
WHEELS = os.environ.get("MAVERICK_WHEELS")  # a folder with the wheel of bfcl-eval, which is not installed: it has hundreds of dependencies
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(WHEELS is None, reason="MAVERICK_WHEELS names no folder with the wheel of bfcl-eval: make clients"),
]


def lines(wheel: zipfile.ZipFile, name: str) -> dict[str, dict]:
    return {line["id"]: line for line in map(json.loads, wheel.read(name).decode().splitlines())}


def cases(kind: str) -> list[tuple[list[Function], list[tuple[str, dict]]]]:
    """Functions, and the calls of one of them or several that answer the question; of each argument the first value that is right."""
    (path,) = Path(WHEELS or "").glob("bfcl_eval-*.whl")
    with zipfile.ZipFile(path) as wheel:
        asked = lines(wheel, DATA.format(kind))
        right = lines(wheel, DATA.format(kind).replace("data/", "data/possible_answer/"))
    return [
        (
            [Function(function["name"], function.get("description"), function["parameters"]) for function in asked[id]["function"]],
            [
                (name, {key: values[0] for key, values in arguments.items() if values and values[0] != ""})
                for call in answer["ground_truth"]
                for name, arguments in call.items()
            ],
        )
        for id, answer in right.items()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_calls_come_out(kind):
    """In each way of writing them whole and letter by letter; in Python's way cut at every place."""
    for functions, calls in cases(kind):
        for name, write in WRITERS.items():
            text = write(calls)
            cuts = [[], list(range(1, len(text)))]
            if name == "python":
                cuts += [[cut] for cut in range(1, len(text))]
            for places in cuts:
                said, found = read(text, functions, places)
                assert said == ""
                assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_there_are_thousands():
    """Signatures, told apart by name and parameters."""
    found = {(f.name, json.dumps(f.parameters, sort_keys=True)) for kind in KINDS for functions, _ in cases(kind) for f in functions}
    assert len(found) >= 2000
