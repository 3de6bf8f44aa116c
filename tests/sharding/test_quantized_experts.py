"""Quantized experts on many devices give what they give on one.

Shape suffixes: T tokens, D model width, E experts, F expert width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from test_dispatch import COMBINATIONS, named

from maverick_jax.errors import UserError
from maverick_jax.ops.quantize import FORMATS, QuantizedArray, dequantize, quantize
from maverick_jax.ops.swiglu import ExpertWeights
from maverick_jax.sharding import LATENCY, THROUGHPUT, Local, make_mesh
from oracle.forward import TOLERANCE, logits, text_ids
from oracle.quantized import model_of, quantize_arrays, small_model

E, D, F, T = 8, 16, 64, 29
FORMS = {"fp8": FORMATS["fp8"], "int4": FORMATS["int4"]._replace(group=8)}  # one scale for all inputs, and eight groups of F
RELATIVE = 1e-5  # to the largest: float32 sums in another order


def experts(name: str) -> ExpertWeights:
    random = np.random.default_rng(0)

    def stack(K, N):
        parts = [quantize(random.standard_normal((K, N), np.float32), FORMS[name]) for _ in range(E)]
        return QuantizedArray(*(jnp.asarray(np.stack(arrays)) for arrays in zip(*parts, strict=True)))

    return ExpertWeights(stack(D, F), stack(D, F), stack(F, D))


def dense(x_TD, expert_T, weights: ExpertWeights):
    """Token after token by the weights that are stood for."""
    gate, up, down = (np.asarray(dequantize(w, lead=1, dtype=jnp.float32))[expert_T] for w in weights)
    hidden = jax.nn.silu(jnp.einsum("TD,TDF->TF", x_TD, gate)) * jnp.einsum("TD,TDF->TF", x_TD, up)
    return np.asarray(jnp.einsum("TF,TFD->TD", hidden, down))


# Every layout with both formats, on one dispatcher or another.
CASES = [(("fp8", "int4")[(i + i // 8) % 2], *combination) for i, combination in enumerate(COMBINATIONS)]


@pytest.mark.parametrize("name, dispatcher, layout, sizes", CASES, ids=named)
def test_all_combinations(name, dispatcher, layout, sizes):
    """However experts and their width are divided, a scale stays with its weights."""
    random, weights = np.random.default_rng(1), experts(name)
    x_TD, expert_T = jnp.asarray(random.standard_normal((T, D), np.float32)), random.integers(0, E, T).astype(np.int32)
    y_TD, stats = jax.jit(dispatcher(make_mesh(**sizes), layout))(x_TD, jnp.asarray(expert_T), weights)
    expected = dense(x_TD, expert_T, weights)
    assert_allclose(y_TD, expected, atol=RELATIVE * np.abs(expected).max(), rtol=0)
    assert int(stats.dropped) == 0


@pytest.mark.parametrize(
    "form, message",
    [
        (FORMATS["int4"]._replace(group=16), "tensor = 8 devices divide the width of every expert, but not the 4 groups of inputs"),
        (FORMATS["int4"], "tensor = 8 devices divide the width of every expert, but not the 12 packed rows"),
    ],
)
def test_groups_that_devices_cannot_share_are_refused(monkeypatch, form, message):
    """Otherwise a shape error from deep inside shard_map, or scales of other weights."""
    monkeypatch.setitem(FORMS, "int4", form)
    if form.group == 128:  # one group of 24 inputs, 12 bytes
        monkeypatch.setitem(globals(), "F", 24)
    with pytest.raises(UserError, match=f"{message}.* take a mesh with fewer of these devices"):
        Local(make_mesh(tensor=8), THROUGHPUT)(jnp.zeros((T, D)), jnp.zeros((T,), jnp.int32), experts("int4"))


@pytest.mark.parametrize(
    "form, components, sizes, layout",
    [
        ("fp8", ("experts",), dict(expert=8), THROUGHPUT),
        ("int4", ("experts", "shared", "dense", "attention"), dict(data=2, expert=2, tensor=2), LATENCY),
    ],
)
def test_a_model_on_a_mesh(form, components, sizes, layout):
    """Leaves lie as their axes say, and the logits are those of the weights that are stood for on one device."""
    small = small_model(2)
    stored, meant = quantize_arrays(small, form, components)
    model = model_of(small, stored, mesh=make_mesh(**sizes), layout=layout)
    ids, lengths = text_ids(8, 40), [40, 17, 1, 33, 16, 40, 5, 24]
    ours, expected = (logits(m, ids, lengths=lengths) for m in (model, model_of(small, meant)))
    for row, length in enumerate(lengths):
        assert_allclose(ours[row, :length], expected[row, :length], atol=TOLERANCE, rtol=0)
    down = model.text.layers[1].feed_forward.experts.down[...]
    ways = {"fp8": (8, 1), "int4": (1, 4)}[form]
    assert down.values.sharding.shard_shape(down.values.shape)[:2] == (8 // ways[0], down.values.shape[1] // ways[1])
