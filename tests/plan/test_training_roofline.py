"""The limit of a step of training against calculations by hand, and against what a compiler counted."""

import dataclasses

import pytest

from maverick_jax.config import Config
from maverick_jax.plan.case import Case
from maverick_jax.plan.topology import Topology
from maverick_jax.plan.training.recipe import Recipe, Training
from maverick_jax.plan.training.roofline import mfu, step
from maverick_jax.sharding.layout import TRAINING
from maverick_jax.training.flops import flops_per_token

CONFIG = dataclasses.replace(Config.maverick(), vision=None)
TOKENS = 64 * 8192


def training(kind, dtype, *, topology="h200:8", mesh=(1, 8, 1), rows=8, **recipe) -> Training:
    return Training(Case(CONFIG, Topology.parse(topology), mesh, TRAINING, dtype, rows, 8192), Recipe(kind, **recipe))


@pytest.mark.parametrize(
    "kind, passes, logits, scores",
    [("lora", 3, 3, 4), ("full", 4, 4, 4)],
    ids=["adapters", "all"],
)
def test_products(kind, passes, logits, scores):
    """2 FLOPs per weight and token in every pass: forward, made again, backward, and for what is learned in full once more."""
    found = step(training(kind, "bfloat16", rows=64)).products
    tokens = TOKENS / 8
    assert found["routed experts"] == passes * 2 * 24 * 3 * 5120 * 8192 * tokens
    assert found["dense layers"] == passes * 2 * 24 * 3 * 5120 * 16384 * tokens
    assert found["unembedding"] == logits * 2 * 5120 * 202_048 * tokens
    seen = 36 * 8193 / 2 + 12 * 8193 / 2  # keys that a token sees, on average
    assert found["scores"] == pytest.approx(scores * 4 * seen * 5120 * tokens)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_products_are_those_of_the_mfu(kind):
    """Where no layer is made again it is what `maverick train` counts, and the logits once more."""
    case = training(kind, "bfloat16", rows=64, remat="none")
    again = 2 * 5120 * 202_048
    counted = flops_per_token(CONFIG, 8192, adapters_only=kind != "full")
    assert sum(step(case).products.values()) == pytest.approx((counted + again) * TOKENS / 8)


def test_products_that_are_kept():
    """Experts are multiplied by again, other weights are not; all are gathered, and tokens travel, as often: the GPU compiler says so."""
    kept, again = (step(training("qlora", "int4", remat=remat)) for remat in ("products", "layers"))
    assert kept.products["routed experts"] == again.products["routed experts"]
    assert kept.products["dense layers"] == 2 / 3 * again.products["dense layers"]
    assert kept.sent["weights all-gather"] == again.sent["weights all-gather"]
    assert kept.sent["tokens all-to-all"] == again.sent["tokens all-to-all"]


def test_as_compiled_for_128_v5p():
    """docs/performance.md: 595 TFLOP, 1.30 s of computing, an MFU of at most 75 %."""
    case = training("full", "bfloat16", topology="v5p:4x4x8", mesh=(2, 32, 2), rows=64, master=True)
    found = step(case)
    assert sum(found.products.values()) / 1e12 == pytest.approx(595, abs=1)
    assert found.binds == "compute"
    assert found.step == pytest.approx(1.30, abs=0.01)
    assert mfu(case, found) == pytest.approx(0.75, abs=0.005)


@pytest.mark.parametrize(
    "where, kind, dtype, accumulate, gathered, moved",
    [
        ({}, "qlora", "int4", 8, 395.0, 161.8),
        ({"topology": "v5p:4x4x8", "mesh": (2, 32, 2), "rows": 64}, "lora", "bfloat16", 1, 53.2, 20.2),
        ({"topology": "v5p:4x4x8", "mesh": (2, 32, 2), "rows": 64}, "qlora", "int4", 1, 35.4, 20.2),
    ],
)
def test_exchanges_as_compiled(where, kind, dtype, accumulate, gathered, moved):
    """All-gathers and all-to-alls of a step in GB, as the compiled texts have them, whole; what a device sends lacks its own part."""
    found = step(training(kind, dtype, accumulate=accumulate, **where)).sent
    among = 32 if where else 8
    assert found["tokens all-to-all"] / 1e9 == pytest.approx(moved * (among - 1) / among, rel=0.02)
    assert found["weights all-gather"] / 1e9 == pytest.approx(gathered, rel=0.3 if where else 0.15)


def test_between_hosts():
    """On two hosts what is gathered over both crosses the network in shares, and binds."""
    one, two = (
        step(training("qlora", "int4", topology=topology, mesh=mesh, rows=rows))
        for topology, mesh, rows in (("h100:8", (1, 8, 1), 8), ("h100:8x2", (2, 8, 1), 16))
    )
    assert "network" not in one.seconds
    assert two.crossed["weights all-gather"] > 0
    assert two.seconds["network"] == sum(two.crossed.values()) / 50e9


def test_no_adapter_is_summed_where_all_its_tokens_come():
    """Gradients of experts' thin matrices need no sum on one host: every token has come to its expert."""
    sent = step(training("qlora", "int4")).sent
    whole = 16 * (48 * (5120 + 2 * 1024 + 5120) + 24 * 3 * 16384 + 24 * 3 * 8192)  # what lies on each device
    assert sent["gradients all-reduce"] == pytest.approx(2 * 7 / 8 * 4 * whole)


def test_micro_batches_gather_anew_and_learn_once():
    one, four = (step(training("qlora", "int4", accumulate=n)) for n in (1, 4))
    assert four.sent["weights all-gather"] == 4 * one.sent["weights all-gather"]
    assert four.read["optimizer"] == one.read["optimizer"]
