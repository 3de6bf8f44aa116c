"""`maverick train demo`, whole and very small, and what it concludes from."""

import argparse
import contextlib
import io
import json
import math

import jax
import numpy as np
import pytest

from maverick_jax.cli.main import main
from maverick_jax.cli.train import demo as train_demo
from maverick_jax.errors import UserError
from maverick_jax.training.demo import evaluation, pipeline, settings, stages
from maverick_jax.training.demo.report import aligned, joined, table, verdict
from maverick_jax.training.demo.settings import Settings, in_minutes


@pytest.mark.parametrize(
    "one, other, p",
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (10, 2, 79 / 2048),
        (2, 10, 79 / 2048),
        (0, 6, 1 / 32),
        (59, 6, 4.964650327128616e-12),
        (190, 150, 0.0342700465332939),
    ],
)
def test_mcnemar(one, other, p):
    """Of 12 pairs 10 to 2: twice (1 + 12 + 66) / 4096; the last two are scipy's binomtest(6, 65) and (150, 340)."""
    assert math.isclose(evaluation.mcnemar(one, other), p, rel_tol=1e-9)


def test_pairs_are_compared():
    stage, control = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 0, 1], bool)
    assert evaluation.compared(stage, control) == {"difference": pytest.approx(0.2), "only_stage": 2, "only_control": 1, "p": 1.0}


def test_accuracy_by_task():
    found = evaluation.by_task(np.array([1, 0, 1, 1], bool), ["read", "add", "read", "add"])
    assert found == {"read": 1.0, "add": 0.5, "all": 0.75}


def test_time_is_the_processors(monkeypatch):
    """Of steps that compile nothing: here all but the first and the third."""
    now, programs = iter([100.0, 105.0, 170.0, 174.0, 175.0]), []
    monkeypatch.setattr(stages, "_compiled", lambda: programs)
    monkeypatch.setattr(stages.time, "process_time", lambda: next(now))
    stop, ended = stages.until(10), []
    for step in range(5):
        programs += ["one"] if step in (0, 2) else []
        ended.append(stop(step, {}))
    assert ended == [False, False, False, False, True]


def test_a_program_that_is_compiled_is_seen():
    before = len(stages._compiled())
    jax.jit(lambda x: x * 5 + before)(np.float32(1))
    assert len(stages._compiled()) == before + 1


def test_minutes(tmp_path):
    """What is held out stays; the rest is in proportion."""
    with pytest.raises(UserError, match="--minutes is 0: give a number above 0"):
        train_demo.run(argparse.Namespace(minutes=0.0, out=tmp_path, compilation_cache=None))
    assert in_minutes(15) == Settings()
    longer = in_minutes(30)
    assert (longer.held_out, longer.pool, longer.preferred, longer.rl_seconds) == (4000, 1066, 320, 80.0)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of the command itself, which asks for less than the smallest number of minutes does."""
    out = tmp_path_factory.mktemp("demo") / "out"
    small = Settings(held_out=10, tries=5, pool=80, group=4, epochs=0.1, rows=4, rl_seconds=0, prompts=4, preferred=10, slots=16)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(settings, "in_minutes", lambda minutes: small if minutes == 3 else None)
        assert main(["train", "demo", str(out), "--minutes", "3", "--seed", "7", "--quiet"]) == 0
    assert printed.getvalue().startswith("accuracy ")
    return json.loads((out / "report.json").read_text()), out


def test_every_stage_and_its_control(report):
    """All models are asked the same, and each stage leaves its run."""
    found, out = report
    names = ["base", "sft random", "sft", "rl unfiltered", "rl", "dpo"]
    assert [*found["stages"]] == names
    assert all([*of_task] == ["read", "compare", "add", "longest", "height", "all"] for of_task in found["stages"].values())
    pairs = {(comparison["stage"], comparison["control"]) for comparison in found["comparisons"]}
    assert {("sft", "sft random"), ("rl", "rl unfiltered"), ("dpo", "rl")} <= pairs
    assert all((out / name / "metrics.jsonl").is_file() for name in names[1:])
    steps = [len((out / name / "metrics.jsonl").read_text().splitlines()) for name in ("sft", "sft random")]
    assert steps[0] == steps[1] > 0
    assert found["seed"] == 7
    assert (out / "report.png").is_file()
    assert len(found["filter"]["passes"]) == 80
    assert found["tries"]["dpo"].keys() == {"pass@1", "pass@4"}
    tokens = {name: np.sum(load) for name, load in found["loads"].items()}
    assert tokens["base"] == tokens["dpo"] > 0
    with pytest.raises(UserError, match="is there already: name a new directory"):
        pipeline.run(out, Settings(), told=print)


def test_the_table(report):
    """Means of seeds, and the test over all of them."""
    found, _ = report
    text = table([found, {**found, "seed": 8}])
    assert "seed 7  seed 8" in text
    assert "rl unfiltered" in text
    comparisons = [{"stage": "a", "control": "b", "difference": d, "only_stage": 6, "only_control": 0, "p": 1 / 32} for d in (0.1, 0.3)]
    both = joined([{"comparisons": [comparison]} for comparison in comparisons], 0)
    assert both["difference"] == pytest.approx(0.2)
    assert (both["only_stage"], both["only_control"], both["p"]) == (12, 0, 1 / 2048)
    assert verdict(both) == "better"
    assert verdict({**both, "only_stage": 0, "only_control": 12}) == "worse"
    assert verdict({**both, "p": 0.06}) == "no difference"
    assert aligned([["of", "n"], ["ab", "10"], ["a", "2"]]) == "of   n\nab  10\na    2"


def test_the_picture(report, tmp_path):
    from PIL import Image

    from maverick_jax.cli.train.plots import save_plots

    save_plots(report[0], tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 1500
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
