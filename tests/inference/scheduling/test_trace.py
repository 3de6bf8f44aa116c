"""A recorded run is planned again as it was; what is no such run, or another, is told by its line."""

from __future__ import annotations

import functools
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
from brute import Trace

from maverick_jax.errors import UserError
from maverick_jax.inference.scheduling.trace import Recording, replay

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "replay_trace.py"


@functools.cache
def recorded(seed: int = 0) -> list[str]:
    stream = io.StringIO()
    Trace(seed, lambda limits: Recording(limits, stream)).run(requests=30)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("seed", range(20))
def test_a_replay_makes_the_same_plans(seed):
    """With deadlines, cancellations and preemptions; at its end nothing runs."""
    lines = recorded(seed)
    plans = list(replay(lines))
    assert len(plans) == sum('"plan":' in line for line in lines)
    scheduler, _ = plans[-1]
    scheduler.check()
    kinds = {next(iter(json.loads(line))) for line in lines}
    assert {"limits", "add", "deliver", "finish", "plan"} <= kinds


def changed(number: int, **values: object) -> list[str]:
    lines = list(recorded())
    lines[number] = json.dumps(json.loads(lines[number]) | values)
    return lines


def test_another_plan_is_told_by_its_line():
    """So a change of the scheduler is seen in a run of yesterday."""
    at = next(i for i, line in enumerate(recorded()) if line.startswith('{"plan"'))
    plan = json.loads(recorded()[at])["plan"]
    with pytest.raises(UserError, match=rf"^line {at + 1} is not what this scheduler plans"):
        list(replay(changed(at, plan=plan | {"finished": [77]})))


@pytest.mark.parametrize(
    "lines, message",
    [
        pytest.param(lambda: recorded()[1:], r"^line 1 .*KeyError\('limits'\)", id="no limits"),
        pytest.param(lambda: [recorded()[0][:50]], r"^line 1 is no event of a trace", id="cut"),
        pytest.param(lambda: [recorded()[0], '{"add":0}'], r"^line 2 is no event of a trace", id="half an event"),
        pytest.param(lambda: [recorded()[0], '{"cancel":7}'], r"^line 2 .*KeyError\(7\)", id="a row that never came"),
        pytest.param(lambda: [recorded()[0], "[1]"], r"^line 2 .*of no known kind", id="a list"),
        pytest.param(lambda: changed(0, limits=None), r"^line 1 .*NoneType", id="limits of nothing"),
        pytest.param(lambda: changed(0, limits={"slots": 2}), r"^line 1 .*missing", id="half of the limits"),
    ],
)
def test_what_is_no_trace_is_told_by_its_line(lines, message):
    """Not by a traceback."""
    with pytest.raises(UserError, match=message):
        list(replay(lines()))


def test_the_script_says_what_was_done(tmp_path, monkeypatch, capsys):
    """Its counts are those of the plans; a trace that is none ends with its line."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(recorded()), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["replay_trace.py", str(trace)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    counts = {line[:28].strip(): line[28:].strip() for line in capsys.readouterr().out.splitlines()}
    plans = [plan for _, plan in replay(recorded())]
    assert counts["steps"] == f"{len(plans):,}"
    assert counts["decode calls"] == f"{sum(call.kind == 'decode' for plan in plans for call in plan.calls):,}"
    assert counts["prefill calls"] == f"{sum(call.kind == 'prefill' for plan in plans for call in plan.calls):,}"
    trace.write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match=r": line 1 is no event of a trace, or one that cannot be here \(KeyError\('limits'\)\): record"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
