"""`maverick bench`: that what it prints was counted right. How fast anything is belongs to no test."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

import maverick_jax as mj
from maverick_jax.bench import floors, loads, machine, measurement
from maverick_jax.bench.plot import save_plot
from maverick_jax.bench.report import Batch, Quantiles, Random, Report
from maverick_jax.cli import options
from maverick_jax.cli.main import main
from maverick_jax.inference.engine import Engine
from maverick_jax.plan.chips import CHIPS
from maverick_jax.plan.topology import Topology
from oracle.plain import plain_model


@pytest.fixture(scope="module")
def model():
    return mj.load()


@pytest.fixture(scope="module")
def small():
    return plain_model(num_hidden_layers=2, attention_chunk_size=8, max_position_embeddings=64)


@pytest.fixture(scope="module")
def engine(small):
    return Engine(small, slots=2, max_length=48)


def on(chip: str, devices: int = 1) -> machine.Machine:
    return machine.Machine(Topology(CHIPS[chip], str(devices)), chip)


class Clock:
    """Time that passes only when somebody sleeps or the engine takes a step."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_times_of_a_load(engine, monkeypatch):
    """A request's clock begins when it was due, not when the engine had time for it; and while nobody asks, nothing is computed."""
    clock, step = Clock(), engine.step

    def slow_step():
        clock.now += 1.0
        step()

    monkeypatch.setattr(loads, "time", clock)
    monkeypatch.setattr(engine, "step", slow_step)
    prompts = loads.random_prompts(engine.model.config, 2, 8, seed=0)
    early, late = loads.serve(engine, [loads.ask(ids, 3) for ids in prompts], [0.5, 20.25])
    assert (early.tokens, early.first, early.between) == ([2.5, 3.5, 4.5], 2.0, [1.0, 1.0])  # of each step the tokens come with the next
    assert (late.tokens[0], late.first) == (22.25, 2.0)
    waiting = loads.serve(engine, [loads.ask(ids, 3) for ids in [*prompts, prompts[0]]], [0.5, 0.5, 1.0])[2]
    assert waiting.first > 4.0  # there are two slots


def timed(tokens: list[float]) -> loads.Timed:
    return loads.Timed(loads.ask(np.array([1]), len(tokens)), tokens=tokens)


def test_decoding_counts_what_all_do_together():
    """Before the last row's first token and after the first row's end fewer rows decode."""
    served = [timed(tokens) for tokens in ([1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0])]
    assert loads.decoding(served) == (4, 2.0)
    assert loads.decoding([timed([1.0, 2.0]), timed([3.0, 4.0])]) == (0, 0.0)


def test_arrivals_are_a_poisson_process():
    """As many per second as were asked for, and gaps as long on average as they vary."""
    gaps = np.diff(loads.arrivals(20_000, 50.0, seed=0))
    assert gaps.mean() == pytest.approx(0.02, rel=0.03)
    assert gaps.std() == pytest.approx(0.02, rel=0.03)


def test_prompts_hold_no_pictures(model):
    """A `<|patch|>` among random tokens would ask for tiles."""
    prompts = loads.random_prompts(model.config, 50, 200, seed=0)
    assert model.config.image_token_index not in np.stack(prompts)
    assert len({ids.tobytes() for ids in prompts}) == 50


def test_floors_are_those_of_the_plan(model):
    """Two rows of 64 tokens of a model with chunks of 32 are read in two calls; a step in the middle of the answer sees 64 + 8 tokens."""
    case = floors.case_of(model, on("h100"), 2, 80)
    assert (case.dtype, case.mesh_name, case.batch, case.context) == ("bfloat16", "data=1", 2, 80)
    calls = [floors.roofline.step(case, 2, 32, start) for start in (0, 32)]
    assert floors.prefill_floor(case, 64).memory == pytest.approx(sum(call.seconds["memory"] for call in calls))
    assert floors.prefill_floor(case, 64).compute == pytest.approx(sum(call.seconds["compute"] for call in calls))
    assert floors.decode_floor(case, 64, 16).memory == floors.roofline.step(case, 2, 1, 72).seconds["memory"]


def test_a_large_batch_is_read_in_several_calls(model):
    """256 rows of 32 tokens make a call of 8,192; the weights are read again for the 44 that are left."""
    case = floors.case_of(model, on("h100"), 300, 48)
    calls = [floors.roofline.step(case, rows, 32, 0).seconds["memory"] for rows in (256, 44)]
    assert floors.prefill_floor(case, 32).memory == pytest.approx(sum(calls))


def test_dtypes_are_named_as_plans_name_them():
    """A quantized model's experts are read in their stored width."""
    assert floors.stored_dtype(mj.load(dtype="float32")) == "float32"
    assert floors.stored_dtype(mj.load(dtype="float16")) == "bfloat16"  # as wide


def test_the_machine(monkeypatch):
    """Eight simulated devices share one processor; a chip that we know is not measured."""
    monkeypatch.setattr(machine, "READ_BYTES", 2**12)
    monkeypatch.setitem(machine.WIDTH, "cpu", 8)
    monkeypatch.setattr(machine, "quickest", lambda function, *arguments: 1e-6)
    whole, shared = (machine.machine_of(jax.devices()[:count], "bfloat16") for count in (1, 8))
    assert (whole.topology.devices, shared.topology.devices) == (1, 8)
    assert whole.topology.chip.bandwidth == 2**12 / 1e-6
    assert whole.topology.chip.flops == 2 * 8**3 / 1e-6
    assert shared.topology.chip.bandwidth == whole.topology.chip.bandwidth / 8
    assert "8 devices, each of cpu" in shared.said
    assert "measured" in shared.said
    monkeypatch.setitem(machine.KINDS, jax.devices()[0].device_kind, "v7x")
    known = machine.machine_of(jax.devices(), "bfloat16")
    assert (known.topology.devices, known.topology.chip.bandwidth) == (8, 3690e9)  # jax counts halves of a chip
    assert "data sheet" in known.said


def test_every_known_kind_has_figures():
    """A name that jax gives a device leads to a row of the table of chips."""
    assert set(machine.KINDS.values()) == set(CHIPS)


def quantiles(value: float) -> Quantiles:
    return Quantiles(value, 2 * value, 3 * value)


def report(model, **changes) -> Report:
    batch = Batch(8, 4000.0, 0.25, 0.5, quantiles(0.02), 640.0, 0.75, 0.1, quantiles(0.0125), 0.0)
    random = Random(4.0, 64, 3.9, 249.6, quantiles(0.03), quantiles(0.015), 0.0)
    case = floors.case_of(model, on("h100"), 8, 576)
    return dataclasses.replace(Report("1 device of H100", case, 512, 64, (batch,), random), **changes)


def test_text(model):
    """Milliseconds, shares and rates stand under their heads; a run that something disturbed says so."""
    text = str(report(model))
    assert re.search(r"^batch 8 +4,000 +25% +50% +20\.0 +40\.0 +60\.0$", text, re.MULTILINE)
    assert re.search(r"^batch 8 +640 +75% +10% +12\.5 +25\.0 +37\.5$", text, re.MULTILINE)
    assert "64 requests at random, 4 per second: 3.9 per second served, 250 new tokens/s" in text
    assert re.search(r"^first token +30\.0 +60\.0 +90\.0$", text, re.MULTILINE)
    assert "note" not in text
    assert "at random" not in str(report(model, random=None))
    disturbed = Random(4.0, 64, 3.9, 249.6, quantiles(0.03), quantiles(0.015), 1.25)
    assert "1.2 s of a timed run went into compiling" in str(report(model, random=disturbed))


def test_quantiles():
    """Of a hundred waits, ninety are at most as long as the second figure."""
    assert Quantiles.of(range(101)) == (50, 90, 99)


def test_plot(model, tmp_path):
    """The limit is what would be reached at 100 %; the title says of what."""
    save_plot(report(model), tmp_path / "bench.svg", model="a$^{$")
    picture = (tmp_path / "bench.svg").read_text(encoding="utf-8")
    for words in ("a$^{$ in bfloat16", "limit: bytes or products", "to the first token", "4/s", "640"):
        assert f"<!-- {words} -->" in picture, words


def test_measured(small, capsys, monkeypatch):
    """From the command line to JSON: every load is warmed up before it counts, and all that was counted is there."""
    monkeypatch.setattr(options, "load_model", lambda args: small)
    monkeypatch.setattr(machine, "READ_BYTES", 2**20)
    monkeypatch.setitem(machine.WIDTH, "cpu", 64)
    ends = []
    serve = loads.serve
    monkeypatch.setattr(measurement, "serve", lambda engine, requests, *due: ends.append(len(requests)) or serve(engine, requests, *due))
    asked = ["bench", "--batch", "2,1", "--prompt", "33", "--new", "4", "--rate", "500", "--requests", "3", "--json"]
    assert main(asked) == 0
    values = json.loads(capsys.readouterr().out)
    assert ends == [1] * 6 + [2] * 6 + [3]  # twice for warming up, once timed, each for one token and for all; and at random
    assert [batch["size"] for batch in values["batches"]] == [1, 2]
    assert (values["prompt"], values["new"], values["dtype"], values["random"]["requests"]) == (33, 4, "float32", 3)
    for part in (*values["batches"], values["random"]):
        assert part["compiling"] == 0.0
        assert 0 < part["first"]["median"] <= part["first"]["p90"] <= part["first"]["p99"]
        assert part["between"]["median"] > 0
    for batch in values["batches"]:
        assert batch["prefill_rate"] > 0
        assert batch["decode_rate"] > 0
        assert 0 < batch["decode_bytes"] < 1000
