"""A model whose weights are quantized computes what the weights compute that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.model import get_abstract_model, parameter_name
from maverick_jax.model.quantized import COMPONENTS, QuantizedWeight, quantizable, quantized_leaves, set_quantized
from oracle.forward import TOLERANCE, logits, text_ids
from oracle.quantized import model_of, quantize_arrays, small_model

EXPERTS = "text.layers.1.feed_forward.experts"


@pytest.fixture(scope="module")
def small():
    """Two dense layers and two mixtures, one layer of them all without RoPE."""
    return small_model(4)


def leaves(model) -> dict:
    return {parameter_name(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.mark.parametrize("form, components", [("fp8", ("experts",)), ("int4", COMPONENTS)])
def test_logits_are_those_of_the_weights_that_are_stood_for(small, form, components):
    """Dense and mixture layers, several chunks. That the quantization changes something shows that it was there."""
    stored, meant = quantize_arrays(small, form, components)
    ids = text_ids(2, 37)
    ours, expected = (logits(model_of(small, arrays), ids) for arrays in (stored, meant))
    assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)
    assert np.abs(ours - logits(small, ids)).max() > 10 * TOLERANCE


def test_layers_may_differ(small):
    """Some checkpoints leave the first and the last layer as they are."""
    stored, meant = quantize_arrays(small, "int8", ("experts",))
    first = [name for name in stored if name.startswith(EXPERTS)]
    for name in first:
        del stored[name]
    stored |= {name: array for name, array in meant.items() if name.startswith(EXPERTS)}
    mixed = model_of(small, stored)
    assert isinstance(mixed.text.layers[1].feed_forward.experts.gate, nnx.Param)
    assert isinstance(mixed.text.layers[3].feed_forward.experts.gate, QuantizedWeight)
    ids = text_ids(2, 37)
    assert_allclose(logits(mixed, ids), logits(model_of(small, meant), ids), atol=TOLERANCE, rtol=0)


def test_gradients_pass_quantized_experts(small):
    """What is not quantized still learns, as beside the weights that are stood for: a router below experts, say."""
    stored, meant = quantize_arrays(small, "int4", ("experts",))
    ids = jnp.asarray(text_ids(1, 12))

    def gradient(arrays):
        model = model_of(small, arrays)
        graphdef, embedding, rest = nnx.split(model, lambda path, _: tuple(path) == ("text", "embedding"), ...)
        weigh = jnp.sin(jnp.arange(12 * model.config.text.vocab_size, dtype=jnp.float32)).reshape(1, 12, -1)
        loss = jax.jit(jax.grad(lambda embedding: (nnx.merge(graphdef, embedding, rest)(ids) * weigh).sum()))
        return np.asarray(jax.tree.leaves(loss(embedding))[0])

    ours, expected = gradient(stored), gradient(meant)
    assert_allclose(ours, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)


def test_leaves_of_the_whole_maverick():
    """What a converter writes and a plan counts: scales lie with the axes of their weights."""
    model = get_abstract_model(Config.maverick())
    whole = leaves(model)
    stored = quantized_leaves(model, "int4", COMPONENTS)
    set_quantized(model, stored)
    found = leaves(model)
    assert {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in found.items()} == stored
    assert len(found) - len(whole) == 24 * (3 + 3) + 24 * 3 + 48 * 4  # experts and shared, dense, attention
    looks = {
        f"{EXPERTS}.down.values": ((128, 4096, 5120), "uint8", ("expert", "expert_mlp", "expert_embed")),
        f"{EXPERTS}.down.scales": ((128, 64, 5120), "float32", ("expert", "expert_mlp", "expert_embed")),
        "text.layers.0.attention.query.scales": ((40, 40, 128), "float32", ("embed", "heads", None)),
        "text.layers.0.attention.output.values": ((40, 64, 5120), "uint8", ("heads", None, "embed")),
        "text.layers.0.attention.output.scales": ((40, 5120), "float32", ("heads", "embed")),
    }
    for name, (shape, dtype, axes) in looks.items():
        assert (found[name].shape, np.dtype(found[name].dtype), found[name].get_metadata()["axes"]) == (shape, dtype, axes)
    assert model.text.layers[1].feed_forward.experts.down.shape == (128, 8192, 5120)


def test_one_scale_for_all_inputs_is_not_divided_like_them():
    model = get_abstract_model(Config.maverick())
    assert all("experts" in name for name, _ in quantizable(model))
    stored = quantized_leaves(model, "fp8")
    assert stored["text.layers.0.attention.query"] == ((5120, 40, 128), np.dtype(jnp.bfloat16))
    set_quantized(model, stored)
    scales = leaves(model)[f"{EXPERTS}.down.scales"]
    assert (scales.shape, scales.get_metadata()["axes"]) == ((128, 1, 5120), ("expert", None, "expert_embed"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scales": None}, rf"{EXPERTS}.gate.values is stored without {EXPERTS}.gate.scales"),
        (
            {"values": ((8, 160, 97), "int8")},
            rf"{EXPERTS}.gate.values has shape \(8, 160, 97\), config.json asks for \(8, 160, 96\) in int8",
        ),
        ({"values": ((8, 160, 96), "uint8")}, r"config.json asks for \(8, 80, 96\) in uint8"),
        ({"values": ((8, 160, 96), "float32")}, rf"{EXPERTS}.gate.values has dtype float32: float8_e4m3fn, int8, uint8 are supported"),
        ({"scales": ((8, 96), "float32")}, rf"{EXPERTS}.gate.scales has shape \(8, 96\), expected \(8, G, 96\)"),
        ({"scales": ((8, 3, 96), "float32")}, "G a divisor of the 160 rows"),
        ({"scales": ((8, 1, 96), "int8")}, rf"{EXPERTS}.gate.scales has dtype int8"),
    ],
)
def test_what_does_not_fit_is_named(small, changes, message):
    model = get_abstract_model(small.config)
    stored = quantized_leaves(model, "int8")
    for part, change in changes.items():
        stored[f"{EXPERTS}.gate.{part}"] = change
    stored = {name: what for name, what in stored.items() if what is not None}
    with pytest.raises(UserError, match=message):
        set_quantized(model, stored)
