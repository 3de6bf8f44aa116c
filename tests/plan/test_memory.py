"""Bytes per device against calculations by hand from the table of parameters (spec section 1)."""

import pytest

from maverick_jax.config import Config
from maverick_jax.plan import make_plan
from maverick_jax.plan.memory import cache_bytes, memory, temporaries

GIB = 2**30
ROUTED = 386_547_056_640  # 24 layers x 128 experts x 3 x 5120 x 8192
SCALES = 24 * 128 * (8192 + 8192 + 5120)  # one per output channel of gate, up and down
ALL = 401_583_781_376


def test_weights_of_maverick_on_64_chips(case):
    """Experts are divided by all 64 devices, other matrices by the eight of `tensor`, routers and norms by none."""
    found = case("v6e:8x8", expert=8, tensor=8).weight_bytes
    vision = found.pop("vision")
    assert found == {
        "routed experts": 2 * ROUTED // 64,
        "shared experts": 2 * 3_019_898_880 // 8,
        "dense layers": 2 * 6_039_797_760 // 8,
        "attention": 2 * 3_019_898_880 // 8,
        "embedding": 2 * 1_034_485_760 // 8,
        "unembedding": 2 * 1_034_485_760 // 8,
        "routers, norms": 2 * (15_728_640 + 496_640),
    }
    assert 2 * 871_932_416 / 8 < vision < 2 * 871_932_416 / 5  # adapter and projector are not divided


@pytest.mark.parametrize(
    "dtype, total",
    [
        ("bfloat16", 2 * ALL),
        ("float32", 4 * ALL),
        ("fp8", ROUTED + 2 * SCALES + 2 * (ALL - ROUTED)),
        ("int8", ROUTED + 4 * SCALES + 2 * (ALL - ROUTED)),
        ("int4", ROUTED // 2 + 4 * ROUTED // 128 + 2 * (ALL - ROUTED)),
    ],
)
def test_weights_in_all(case, dtype, total):
    """One device holds the whole model, each parameter once. What is quantized has scales, bfloat16 in FP8, else float32, for every
    output channel, or in int4 for 128 weights; the rest stays in bfloat16."""
    found = case("h100:1", dtype=dtype)
    assert found.weight_total == sum(found.weight_bytes.values()) == total


def test_fp8_scales_lie_with_their_channels(case):
    """expert=2, tensor=4: scales of gate and up are divided like their widths, those of down only like the experts."""
    found = case("h100:8", expert=2, tensor=4, dtype="fp8").weight_bytes["routed experts"]
    assert found == ROUTED // 8 + 2 * 24 * 128 * (2 * 8192 // 8 + 5120 // 2)


def test_int4_scales_are_divided_like_their_weights(case):
    """In down the scales of groups of inputs go with the inputs: widths over all devices leave nothing whole."""
    found = case("h100:8", tensor=8, dtype="int4").weight_bytes["routed experts"]
    assert found == (ROUTED // 2 + 4 * ROUTED // 128) // 8


def test_fp8_is_the_size_of_the_released_checkpoint(case):
    assert f"{case('h100:1', dtype='fp8').weight_total / 1e9:.2f}" == "416.75"


def test_a_million_tokens(case):
    """12 layers keep every token, 36 keep one chunk of 8,192; keys and values, 8 heads of 128, bfloat16: 4,096 B per token."""
    rope, full = cache_bytes(case("h100:1", batch=1, context=1_048_576))
    assert (rope, full) == (36 * 8192 * 4096, 12 * 1_048_576 * 4096)
    assert f"{(rope + full) / GIB:.1f}" == "49.1"


def test_cache_is_divided_by_rows_and_heads(case):
    """64 rows on 8 devices of `expert`, 8 heads on 8 of `tensor`: a device has 8 rows of one head."""
    rope, full = cache_bytes(case("v6e:8x8", expert=8, tensor=8, context=16_384))
    assert (rope, full) == (8 * 36 * 8192 * 512, 8 * 12 * 16_384 * 512)


def test_a_small_batch_leaves_devices_to_the_sequence(case):
    """4 rows on 8 devices of `expert`: each device has all of them, an eighth of every page; a page of 511 slots has no eighth."""
    assert cache_bytes(case("v6e:8x8", expert=8, tensor=8, batch=4))[0] == 4 * 36 * 8192 * 512 // 8
    assert cache_bytes(case("v6e:8x8", expert=8, tensor=8, batch=4, context=511))[0] == 4 * 36 * 511 * 512


def test_temporaries_follow_their_formula(case):
    """A prefill piece of 1,024 tokens of 8 prompts, one per device of `expert`; F = 16384 / 8, 5 query heads, V = 202048 / 8."""
    assert temporaries(case("v6e:8x8", expert=8, tensor=8), 8, 1024) == {
        "activations": 1024 * (4 * 5120 + 3 * 2048) * 2,
        "scores": 2**25 * (4 + 2),  # of 5 * 1024 * 8192, in blocks
        "logits": 2 * 25_256 * 4,
        "dispatch": 4 * 2 * 1024 * 5120 * 2,
    }


def test_total_and_reserve(case):
    found = memory(case("v6e:8x8", expert=8, tensor=8))
    assert found.needed == sum(found.weights.values()) + found.rope_cache + found.full_cache + sum(found.temporaries.values())
    assert found.usable == int(32 * GIB * 0.94)
    assert found.fits
    assert found.free == found.usable - found.needed


def test_maverick_in_fp8_on_one_host_of_h100s(maverick_config):
    """The public claim holds, with tensor parallelism; with whole experts per device the replicated rest leaves no room for 64 rows."""
    plan = make_plan(maverick_config, topology="h100:8", dtype="fp8")
    assert plan.fits
    assert plan.case.mesh_shape == (1, 1, 8)
    assert not make_plan(maverick_config, topology="h100:8", dtype="fp8", mesh={"expert": 8}).fits
    assert not make_plan(maverick_config, topology="h100:8").fits


def test_room_is_the_border(maverick_config):
    """One more share of rows, or 1,024 more tokens, do not fit."""
    question = dict(topology="h100:8", dtype="fp8", mesh={"expert": 2, "tensor": 4})
    plan = make_plan(maverick_config, batch=8, **question)
    rows, context = plan.largest_batch, plan.largest_context
    assert rows % 2 == 0
    for batch, length, fits in ((rows, 8192, True), (rows + 2, 8192, False), (8, context, True), (8, context + 1024, False)):
        assert make_plan(maverick_config, batch=batch, context=length, **question).fits is fits


def test_scout(maverick_config):
    """Every layer a mixture, 108.6 B parameters: nothing of the plan may depend on Maverick's interleaving."""
    plan = make_plan(Config.scout(), topology="v5p:2x2x2", batch=8)
    assert plan.case.weight_total == 2 * 108_641_793_536
    assert "dense layers" not in plan.memory.weights
    assert plan.fits
