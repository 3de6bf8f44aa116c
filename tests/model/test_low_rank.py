"""An adapted model computes what the weights compute that it stands for, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from maverick_jax.adapter import load_adapter, load_adapters
from maverick_jax.errors import UserError
from maverick_jax.model import get_abstract_model
from maverick_jax.model.compiled import take_apart
from maverick_jax.model.low_rank import ADAPTABLE, adaptable, adapters, add_adapters
from maverick_jax.model.named_adapters import choose
from oracle.adapted import NAMED, RANKS, merged, save_named, teach
from oracle.forward import TOLERANCE, text_ids
from oracle.plain import PATCH, SIDE, VISION, plain_config, plain_model
from oracle.quantized import model_of, quantize_arrays, small_model

GRADIENT = 1e-4  # relative to the largest entry: float32 sums in another order


def pictures() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(5, 50, (2, 20)).astype(np.int32)
    ids[:, 3] = PATCH
    return ids, np.random.default_rng(1).uniform(-1, 1, (2, 3, SIDE, SIDE)).astype(np.float32)


def test_a_new_adapter_changes_nothing():
    """Bit for bit: training begins at the model that was loaded."""
    model, (ids, tiles) = plain_model(vision=VISION), pictures()
    before = model(ids, tiles)
    assert len(add_adapters(model, RANKS)) == len(adapters(model)) > 30
    assert adaptable(model) == []
    assert_array_equal(model(ids, tiles), before)


def test_every_component_counts():
    """Attention, dense, shared and routed experts, router, unembedding, pictures: as base and adapter added up."""
    ids, tiles = pictures()
    for part in ADAPTABLE:
        inputs, options = ((ids, tiles), {"vision": VISION}) if part == "vision" else ((np.minimum(ids, PATCH - 1),), {})
        model = plain_model(**options)
        before = model(*inputs)
        add_adapters(model, {part: 3}, scale=0.5)
        teach(model)
        ours = model(*inputs)
        assert np.abs(ours - before).max() > 10 * TOLERANCE, part
        assert_allclose(ours, merged(model)(*inputs), atol=TOLERANCE, rtol=0, err_msg=part)


@pytest.mark.parametrize("form", [None, "int4"])
def test_gradients_are_those_of_the_sum(form):
    """By the chain rule from the gradient of base + scale a b, with every weight quantized or plain; what is quantized stays."""
    base, ids = small_model(2), text_ids(2, 37)
    stored, meant = quantize_arrays(base, form, ("experts", "shared", "dense", "attention")) if form else (None, None)
    model = base if stored is None else model_of(base, stored)
    add_adapters(model, RANKS)
    teach(model)
    graphdef, learned, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(learned):
        return jnp.sin(nnx.merge(graphdef, learned, rest)(ids)).sum()

    gradient = nnx.merge(graphdef, jax.jit(jax.grad(loss))(learned), rest)
    whole = merged(model, model_of(base, meant) if meant else small_model(2))
    graphdef, state = nnx.split(whole)
    of_sum = nnx.merge(graphdef, jax.jit(jax.grad(lambda state: jnp.sin(nnx.merge(graphdef, state)(ids)).sum()))(state))
    dense = {weight.name: weight for weight in adaptable(of_sum)}
    ours = adapters(gradient)
    assert ours.keys() >= {"text.layers.1.feed_forward.experts.gate", "text.layers.1.feed_forward.experts.down", "text.unembedding"}
    for name, adapter in adapters(model).items():
        sides, dw = dense[name].sides, np.asarray(dense[name].weight[...])
        stack, rank = dw.shape[: sides.stack], adapter.a.shape[-1]
        inputs = int(np.prod(dw.shape[sides.stack : sum(sides)]))
        dw = adapter.scale * dw.reshape(*stack, inputs, -1)
        a, b = np.asarray(adapter.a[...]).reshape(*stack, inputs, rank), np.asarray(adapter.b[...]).reshape(*stack, rank, -1)
        for leaf, expected in ((ours[name].a, dw @ b.swapaxes(-1, -2)), (ours[name].b, a.swapaxes(-1, -2) @ dw)):
            largest = np.abs(expected).max()
            assert largest > 0, name
            assert_allclose(np.asarray(leaf[...]).reshape(expected.shape), expected, atol=GRADIENT * largest, rtol=0, err_msg=name)


def test_a_model_without_weights_has_them_described():
    """What a planner asks: shapes and dtypes of 400 B parameters' adapters."""
    model = get_abstract_model(plain_config(), dtype="bfloat16")
    add_adapters(model, {"experts": 4}, dtype="bfloat16")
    up = adapters(model)["text.layers.1.feed_forward.experts.up"]
    assert (up.a.shape, up.b.shape, up.a.dtype) == ((4, 16, 4), (4, 4, 24), jnp.bfloat16)


def test_a_model_says_that_it_is_adapted():
    """The parameters that were loaded are counted as before."""
    model = plain_model()
    count = str(model).split(", ")[2]
    add_adapters(model, {"attention": 2})
    assert count in str(model)
    assert "adapters of 672 parameters" in str(model)


@pytest.mark.parametrize(
    "ranks, more, words",
    [
        ({"expert": 4}, {}, "adapters are asked for in 'expert': choose from experts, shared"),
        ({"experts": 0}, {}, "the rank of adapters in experts is 0: give a whole number from 1"),
        ({"experts": True}, {}, "the rank of adapters in experts is True"),
        ({"experts": 2}, {"scale": float("nan")}, "the scale of adapters is nan"),
        ({"vision": 2}, {}, "no weights in vision that could have adapters"),
        ({}, {}, "no weights in no component"),
    ],
)
def test_what_is_no_adapter(ranks, more, words):
    """Each in one line, and the model is as it was."""
    model = plain_model()
    with pytest.raises(UserError, match=words):
        add_adapters(model, ranks, **more)
    assert not adapters(model)


@pytest.mark.parametrize("form", [None, "int4"])
def test_rows_with_adapters_of_their_own(tmp_path, form):
    """Each is what a model says that has its adapter alone, also beside quantized weights; and one without is the base's, bit for bit."""
    base, ids = small_model(2), text_ids(5, 20)
    base = base if form is None else model_of(base, quantize_arrays(base, form, ("experts", "shared", "dense", "attention"))[0])
    named = load_adapters(base, paths := save_named(base, tmp_path))
    expected = {None: base(ids)}
    structure, leaves = take_apart(named.beside(base))
    program = jax.jit(lambda leaves, ids, adapter_B: choose(structure(leaves), adapter_B)(ids))
    adapter_B = np.array([0, 1, 2, 3, 0], np.int32)
    found = program(leaves, ids, adapter_B)
    assert_array_equal(program(leaves, ids, 0 * adapter_B), expected[None])
    assert_array_equal(base(ids), expected[None])  # nothing was added to it
    for name in NAMED:
        model = nnx.clone(base)
        load_adapter(model, paths[name])
        expected[name] = model(ids)
        assert np.abs(expected[name] - expected[None]).max() > 100 * TOLERANCE
        assert_allclose(named.alone(base, name)(ids), expected[name], atol=TOLERANCE, rtol=0)
    for row, name in enumerate((None, *NAMED, None)):
        assert_allclose(found[row], expected[name][row], atol=TOLERANCE, rtol=0)
        assert name or (np.asarray(found[row]) == np.asarray(expected[None][row])).all()
