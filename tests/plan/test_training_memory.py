"""Bytes per device in a step of training: against what compilers said of Maverick's text decoder, and calculations by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from maverick_jax.config import Config
from maverick_jax.plan.case import Case
from maverick_jax.plan.topology import Topology
from maverick_jax.plan.training.memory import memory, sent_rows
from maverick_jax.plan.training.recipe import REMATS, Recipe, Training
from maverick_jax.sharding import AllToAll
from maverick_jax.sharding.layout import TRAINING
from maverick_jax.training.optimization import Optimization
from maverick_jax.training.step import abstract_moments
from maverick_jax.training.trainer import REMAT

GB = 1e9
ARGUMENTS, TEMPORARIES = 0.02, 0.25  # shares by which an estimate may be off: what stays is counted, what a step needs is not
ROUTED = 386_547_056_640  # 24 layers x 128 experts x 3 x 5120 x 8192


@pytest.fixture(scope="module")
def training():
    """`training("h200:8", (1, 8, 1), "qlora", "int4", rows=8)`: of the text decoder, in rows of 8,192 tokens."""
    config = dataclasses.replace(Config.maverick(), vision=None)

    def make(topology, mesh, kind, dtype, *, rows, length=8192, **recipe) -> Training:
        return Training(Case(config, Topology.parse(topology), mesh, TRAINING, dtype, rows, length), Recipe(kind, **recipe))

    return make


V5P, HOST = ("v5p:4x4x8", (2, 32, 2)), ("h200:8", (1, 8, 1))


@pytest.mark.parametrize(
    "where, kind, dtype, rows, recipe, arguments, temporaries",
    [
        # docs/performance.md, "Training, compiled for TPU and GPU": 64 rows of 8,192 tokens.
        (V5P, "full", "bfloat16", 64, {"master": True}, 37.8, 18.7),
        (V5P, "lora", "bfloat16", 64, {}, 6.6, 11.3),
        (V5P, "qlora", "fp8", 64, {}, 3.6, 9.5),
        (V5P, "qlora", "int4", 64, {}, 2.2, 9.6),
        (HOST, "qlora", "int4", 8, {"accumulate": 8}, 30.4, 27.6),
        (HOST, "qlora", "fp8", 8, {"accumulate": 8}, 53.1, 27.6),
        (HOST, "lora", "bfloat16", 8, {"accumulate": 8}, 101.4, 27.6),
        # The same benchmark for h100:8 and one micro-batch: 4 layers, and ten times what 4 further ones add to them and themselves.
        (("h100:8", (1, 8, 1)), "qlora", "int4", 8, {}, 30.4, 21.5),
        (("h100:8", (1, 8, 1)), "qlora", "int4", 16, {}, 30.4, 40.9),
        (("h100:8", (1, 8, 1)), "qlora", "int4", 8, {"remat": "products"}, 30.4, 58.3),
        (("h100:8", (1, 8, 1)), "qlora", "int4", 8, {"remat": "none"}, 30.4, 128.3),
    ],
)
def test_as_the_compilers_said(training, where, kind, dtype, rows, recipe, arguments, temporaries):
    """An estimate that is far from what XLA takes says that a run fits which does not, or sends people to a larger machine."""
    held = memory(training(*where, kind, dtype, rows=rows, **recipe))
    stays = sum(held.weights.values()) + held.adapters + held.moments
    assert stays / GB == pytest.approx(arguments, rel=ARGUMENTS)
    assert sum(held.temporaries.values()) / GB == pytest.approx(temporaries, rel=TEMPORARIES)


def test_adapters_by_hand(training):
    """On eight devices: experts' thin matrices are divided by eight; of others those beside the model width, what has none lies on each."""
    held = memory(training(*HOST, "qlora", "int4", rows=8))
    experts = 24 * 128 * 4 * 3 * (5120 + 8192) // 8
    wide = 16 * (48 * 4 * 5120 + 24 * 3 * 5120 + 24 * 3 * 5120)  # query, key, value, output; dense; shared
    whole = 16 * (48 * (5120 + 2 * 1024 + 5120) + 24 * 3 * 16384 + 24 * 3 * 8192)
    assert held.adapters == 4 * (experts + wide // 8 + whole)
    assert held.moments == 2 * held.adapters
    assert held.weights["routed experts"] == (ROUTED // 2 + 4 * ROUTED // 128) // 8


def test_moments_are_the_optimizers(training):
    """Two float32 arrays of every learned one: what optax itself makes of a learned array's shape, but for its counters."""
    moments = abstract_moments({"a": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)}, Optimization(steps=1).optimizer())
    bytes_of = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(moments) if leaf.ndim)
    case = training(*HOST, "full", "bfloat16", rows=8)
    assert memory(case).moments / case.learned_elements == bytes_of / 15


def test_masters_and_weights(training):
    """All weights, in bfloat16 or from float32 masters: 400.7 B over 128 devices, of which two halve some by width."""
    plain, master = (memory(training(*V5P, "full", "bfloat16", rows=64, master=master)) for master in (False, True))
    assert master.weights == {part: 2 * size for part, size in plain.weights.items()}
    assert plain.weights["routed experts"] == 2 * ROUTED // 128
    assert plain.adapters == master.adapters == 0


def test_the_vision_tower_is_not_learned():
    """Text teaches it nothing, and no moments are made for it."""
    whole = Training(Case(Config.maverick(), Topology.parse("v5p:4x4x8"), (2, 32, 2), TRAINING, "bfloat16", 64, 8192), Recipe("full"))
    assert {kind.component for kind in whole.frozen} == {"vision"}
    assert "vision" not in {kind.component for kind in whole.learned}


def test_sums_of_gradients_stay_beside_those_of_a_micro_batch(training):
    one, two = (memory(training(*HOST, "qlora", "int4", rows=8, accumulate=n)) for n in (1, 2))
    assert one.temporaries["sums of gradients"] == 0
    assert two.temporaries["sums of gradients"] == two.adapters


def test_gradients_take_the_place_of_what_layers_kept(training):
    """Going back, the one grows as the other shrinks: the larger is all that there is room for."""
    full, adapters = (training(*V5P, kind, "bfloat16", rows=64) for kind in ("full", "lora"))
    assert memory(full).temporaries["gradients"] == 4 * full.learned_elements > 48 * 8192 * 5120 * 2
    assert "kept by layers" not in memory(full).temporaries
    assert memory(adapters).temporaries["kept by layers"] == 48 * 8192 * 5120 * 2
    assert "gradients" not in memory(adapters).temporaries


def test_more_tokens_take_more(training):
    """Twice the rows, or rows twice as long, are twice the activations; what does not depend on tokens stays."""
    one, rows, length = (
        memory(training(*HOST, "qlora", "int4", rows=n, length=t)).temporaries for n, t in ((8, 8192), (16, 8192), (8, 16384))
    )
    assert one["kept by layers"] == 48 * 8192 * 5120 * 2
    assert rows == length
    assert rows["kept by layers"] == 2 * one["kept by layers"]
    assert rows["routed experts, 2 rounds"] == 2 * one["routed experts, 2 rounds"]
    assert rows["a layer's weights"] == one["a layer's weights"]


def test_short_rows_wait_for_the_logits(training):
    """Of few tokens the unembedding, gathered, is more than any layer: 5,120 x 202,048 in bfloat16, and 256 logits in float32 twice."""
    held = memory(training(*HOST, "qlora", "int4", rows=8, length=256)).temporaries
    assert held["unembedding"] == 2 * 5120 * 202_048
    assert held["a piece of the logits"] == 256 * 202_048 * (4 + 4 + 2)
    assert "a layer" not in held


@pytest.mark.parametrize("tokens", [8192, 1001])
def test_buffers_are_the_dispatchers(training, tokens):
    """Each of eight destinations has room for twice an even share."""
    case = training(*HOST, "qlora", "int4", rows=8).case
    capacity = AllToAll(case.mesh, TRAINING)._capacity(tokens, 8)
    assert sent_rows(case, tokens) == 8 * capacity


def test_rounds(training):
    """Between two devices twice an even share is all there is, and one device sends nothing."""
    two, one = (training("h200:8", mesh, "qlora", "int4", rows=8, length=1024) for mesh in ((4, 2, 1), (8, 1, 1)))
    assert [sent_rows(some.case, 1024) for some in (two, one)] == [2048, 1024]
    for some in (two, one):
        assert "routed experts, 1 round" in memory(some.with_length(8192)).temporaries


def test_what_can_be_made_again():
    """The names are the trainer's."""
    assert set(REMATS) == set(REMAT)
