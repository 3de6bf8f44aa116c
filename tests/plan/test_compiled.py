"""Whole models, made small, through the real TPU compiler: what `benchmarks/compiled_for_accelerators.py` does at full size."""

import dataclasses
import importlib.util

import pytest

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.plan.compiled import compile_program, target_mesh
from maverick_jax.plan.programs import Programs
from maverick_jax.plan.topology import Topology
from maverick_jax.sharding import LATENCY, THROUGHPUT

needs_tpu_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")


def small(whole: Config | None = None, layers: int = 4) -> Config:
    """A model (Maverick) at its real widths but for the vocabulary, with one NoPE layer among four."""
    whole = whole or Config.maverick()
    within = {name: tuple(i for i in getattr(whole.text, name) if i < layers) for name in ("moe_layers", "nope_layers")}
    text = dataclasses.replace(whole.text, num_hidden_layers=layers, vocab_size=1024, **within)
    return dataclasses.replace(whole, text=text, vision=None)


@needs_tpu_compiler
@pytest.mark.parametrize("layout", [THROUGHPUT, LATENCY], ids=lambda layout: layout.name)
@pytest.mark.parametrize("preset", [Config.maverick, Config.scout], ids=lambda preset: preset.__name__)
def test_a_decode_step_moves_its_arguments_once(preset, layout):
    """Weights and cache are read once and copied nowhere; tokens travel as the layout says, three exchanges per mixture."""
    topology, config, batch, context = Topology.parse("v6e:4x4"), small(preset()), 16, 4096
    mesh = target_mesh(topology, (1, 4, 4))
    done = compile_program(Programs(config, mesh, layout).decode(batch, context), mesh)
    assert done.traffic.hbm < 1.15 * done.arguments
    keys_of_a_layer = batch * config.text.num_key_value_heads * context * config.text.head_dim * 2 / mesh.size
    # Buffers are written in place, by the token: of eight the compiler stages one on the chip at most.
    assert done.traffic.written < 2 * keys_of_a_layer
    assert done.temporaries < 0.2e9
    assert done.needed < topology.chip.memory
    exchanges = done.traffic.collectives.get("all-to-all")
    assert (exchanges.count if exchanges else 0) == (3 * len(config.text.moe_layers) if layout is THROUGHPUT else 0)
    assert done.traffic.loops == 0


@needs_tpu_compiler
@pytest.mark.parametrize("dtype, layout", [("fp8", THROUGHPUT), ("int4", LATENCY)], ids=["fp8", "int4"])
def test_a_decode_step_reads_experts_as_they_are_stored(dtype, layout):
    """No copy of the experts in bfloat16: what is moved and held stays in proportion to the bytes that are stored."""
    config, mesh = small(layers=2), target_mesh(Topology.parse("v6e:4x4"), (1, 4, 4))
    done = compile_program(Programs(config, mesh, layout, dtype).decode(16, 1024), mesh)
    experts_in_bfloat16 = 2 * 128 * 3 * 5120 * 8192 / mesh.size
    assert done.arguments < {"fp8": 0.65, "int4": 0.4}[dtype] * experts_in_bfloat16
    assert done.traffic.hbm < 1.15 * done.arguments
    assert done.temporaries < 0.1 * experts_in_bfloat16


@needs_tpu_compiler
def test_a_long_prompt_holds_no_square_of_scores():
    """256k tokens on four chips: the scores of one head, a quarter of them on each chip, would be 69 GB."""
    text = dataclasses.replace(small().text, hidden_size=512, intermediate_size_mlp=1024, num_attention_heads=4, num_key_value_heads=4)
    text = dataclasses.replace(text, num_hidden_layers=2, moe_layers=(), nope_layers=(0, 1))
    mesh = target_mesh(Topology.parse("v6e:2x2"), (1, 4, 1))
    done = compile_program(Programs(Config(text=text), mesh, THROUGHPUT).prefill(1, 2**18), mesh)
    assert done.temporaries < 2e9


@needs_tpu_compiler
def test_whole_prompts_take_the_flash_kernel():
    """Four prompts of 8,192 tokens on four chips: each layer's attention is one call of the kernel, within `shard_map`."""
    text = dataclasses.replace(small().text, hidden_size=512, intermediate_size_mlp=1024, num_attention_heads=4, num_key_value_heads=2)
    text = dataclasses.replace(text, num_hidden_layers=3, moe_layers=(), nope_layers=(1,))
    mesh = target_mesh(Topology.parse("v6e:2x2"), (1, 4, 1))
    done = compile_program(Programs(Config(text=text), mesh, THROUGHPUT).prefill(4, 2**13), mesh)
    assert done.traffic.custom_calls["tpu_custom_call"] == 2  # the last layer's one query per row needs none


def test_a_decode_step_on_gpus_joins_no_matrices():
    """Scout's router beside its shared expert: as one product they cost a copy of both in every step."""
    try:
        mesh = target_mesh(Topology.parse("h200:8"), (1, 8, 1))
    except UserError as error:
        pytest.skip(str(error))
    done = compile_program(Programs(small(Config.scout(), layers=2), mesh, THROUGHPUT).decode(64, 4096), mesh)
    assert done.traffic.hbm < 1.05 * done.arguments


def test_a_later_piece_on_a_gpu_has_one_attention_per_layer():
    """8,192 tokens behind as many: a kernel over the pages, or, where a chunk begins, cuDNN's among themselves; no loop of operations."""
    try:
        mesh = target_mesh(Topology.parse("h200:1"), (1, 1, 1))
    except UserError as error:
        pytest.skip(str(error))
    text = dataclasses.replace(small().text, num_local_experts=8, intermediate_size=1024, intermediate_size_mlp=1024)
    done = compile_program(Programs(Config(text=text), mesh, THROUGHPUT).prefill(1, 2**13, 2**14, first=False), mesh)
    assert done.traffic.loops == 0
    assert done.traffic.launches < 120
    # Where chunks begin the device decides, and what it decides between is not counted.
    # The layer that sees everything is the last, whose one query per row is shared by programs and merged; a mixture's tiles are planned.
    assert done.traffic.custom_calls["__gpu$xla.gpu.triton"] == 2 * len(text.nope_layers) + (3 + 1) * len(text.moe_layers)


def test_the_vision_tower_on_a_gpu_takes_cudnn():
    """577 tokens of a tile, heads of 88: per layer one call, in place of products, a softmax and their scores in memory."""
    try:
        mesh = target_mesh(Topology.parse("h200:1"), (1, 1, 1))
    except UserError as error:
        pytest.skip(str(error))
    maverick = Config.maverick()
    assert maverick.vision is not None
    config = dataclasses.replace(small(layers=1), vision=dataclasses.replace(maverick.vision, num_hidden_layers=2))
    done = compile_program(Programs(config, mesh, THROUGHPUT).vision(16), mesh)
    assert done.traffic.custom_calls["__cudnn$fmhaSoftmax"] == 2


def test_a_missing_compiler_is_named(monkeypatch):
    """Which extra to install, instead of a plug-in's traceback."""
    from maverick_jax.plan import targets

    def missing(**_):
        raise RuntimeError("Unknown backend")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"the cuda compiler cannot be used here .* pip install 'maverick-jax\[cuda13\]'"):
        target_mesh(Topology.parse("h200:8"), (1, 8, 1))
