"""Adapters on many devices: where they lie, and that they give what they give on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from maverick_jax.adapter import load_adapters
from maverick_jax.model.compiled import take_apart
from maverick_jax.model.low_rank import adapters, add_adapters
from maverick_jax.model.named_adapters import choose
from maverick_jax.sharding import LATENCY, THROUGHPUT, TRAINING, AttendOnMesh, Constrain, make_dispatcher, make_mesh
from oracle.adapted import RANKS, save_named, teach
from oracle.forward import TOLERANCE, logits, text_ids
from oracle.plain import plain_model
from oracle.quantized import model_of, quantize_arrays, small_model

GRADIENT = 1e-4  # relative to the largest entry


@pytest.mark.parametrize(
    "form, sizes, layout",
    [
        ("int4", dict(data=2, expert=2, tensor=2), TRAINING),
        (None, dict(expert=2, tensor=2), LATENCY),
    ],
)
def test_the_same_on_a_mesh(form, sizes, layout):
    """Random values too, and gradients: nothing of an adapter depends on where it lies."""
    base, ids = small_model(2), text_ids(8, 20)
    arrays = quantize_arrays(base, form or "fp8", ("experts", "shared") if form else ())[0]
    mesh = make_mesh(**sizes)
    models = [model_of(base, arrays), model_of(base, arrays, mesh=mesh, layout=layout)]
    found = []
    for model in models:
        add_adapters(model, RANKS)
        teach(model)
        graphdef, learned, rest = nnx.split(model, nnx.LoRAParam, ...)
        gradient = jax.jit(jax.grad(lambda learned: jnp.sin(nnx.merge(graphdef, learned, rest)(ids)).mean()))(learned)  # noqa: B023
        found.append((adapters(model), logits(model, ids), jax.tree.map(np.asarray, nnx.to_flat_state(gradient))))
    (here, logits_here, gradient_here), (there, logits_there, gradient_there) = found
    for name, adapter in there.items():
        assert_array_equal(adapter.a[...], here[name].a[...])
    assert_allclose(logits_there, logits_here, atol=TOLERANCE, rtol=0)
    for (path, one), (_, other) in zip(gradient_here, gradient_there, strict=True):
        assert_allclose(other[...], one[...], atol=GRADIENT * np.abs(one[...]).max(), rtol=0, err_msg=str(path))


def test_they_lie_beside_their_experts():
    """An adapter of 128 experts that lay whole on every device would take as much room as the experts do."""
    base = small_model(2)
    model = model_of(base, quantize_arrays(base, "fp8", ())[0], mesh=make_mesh(data=2, expert=2, tensor=2), layout=TRAINING)
    add_adapters(model, {"experts": 4, "attention": 4})
    down = adapters(model)["text.layers.1.feed_forward.experts.down"]
    assert down.a[...].sharding.spec == jax.sharding.PartitionSpec("expert", "tensor", None)
    assert down.b[...].sharding.spec == jax.sharding.PartitionSpec("expert", None, "data")
    query = adapters(model)["text.layers.0.attention.query"]
    assert query.b[...].sharding.shard_shape(query.b.shape) == (4, 5, 16)


@pytest.mark.parametrize(
    "sizes, layout, dispatcher",
    [
        (dict(expert=8), THROUGHPUT, "all_to_all"),
        (dict(data=2, expert=4), THROUGHPUT, "ragged"),
        (dict(data=2, expert=2, tensor=2), THROUGHPUT, "local"),
        (dict(expert=4, tensor=2), LATENCY, None),
    ],
)
def test_rows_with_adapters_of_their_own_on_a_mesh(tmp_path, sizes, layout, dispatcher):
    """A token travels with its adapter, whichever dispatcher sends it; the load is still counted by expert."""
    text, ids = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=8), text_ids(4, 33) % 60
    mesh, adapter_B = make_mesh(**sizes), np.array([2, 0, 1, 3], np.int32)
    options = dict(
        constrain=Constrain(mesh, layout), dispatcher=make_dispatcher(mesh, layout, dispatcher), attend=AttendOnMesh(mesh, layout)
    )
    models = [plain_model(**text), plain_model(options=options, **text)]
    paths, found = save_named(models[0], tmp_path), []
    for model in models:
        structure, leaves = take_apart(load_adapters(model, paths).beside(model))

        def run(leaves, structure=structure):
            model = choose(structure(leaves), adapter_B)
            x_BTD, _, (stats,) = model.hidden(model.embed(ids), np.array([33, 33, 12, 33]))
            return model.logits(x_BTD), stats.load_E, stats.dropped

        found.append([np.asarray(one) for one in jax.jit(run)(leaves)])
    (here, load_here, _), (there, load_there, dropped) = found
    assert_allclose(there[:2], here[:2], atol=TOLERANCE, rtol=0)
    assert_allclose(there[2, :12], here[2, :12], atol=TOLERANCE, rtol=0)
    assert_array_equal(load_there, load_here)
    assert (load_there.sum(), dropped) == (33 * 3 + 12, 0)
