"""Laid out over eight simulated devices the model still computes what transformers computes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose
from transformers import Llama4TextConfig

from maverick_jax.inference.cache import KVCache
from maverick_jax.sharding import LATENCY, THROUGHPUT, TRAINING, AllToAll, get_layout, make_mesh
from maverick_jax.sharding.attend import PAGES
from oracle.forward import TOLERANCE, cached_step, forms_for_tpu, logits, text_ids
from oracle.pair import picture_prompt
from oracle.port import port
from oracle.tiny_checkpoints import make_model, text_values

MESHES = [
    ("tiny_maverick", dict(expert=8), THROUGHPUT),
    ("tiny_maverick", dict(data=2, expert=2, tensor=2), LATENCY),
    ("tiny_scout", dict(expert=4), THROUGHPUT),
    ("tiny_scout", dict(data=2, expert=2, tensor=2), TRAINING),
    # Query heads divided, key/value heads not: a query must still find the head that is its own.
    ("tiny_scout", dict(expert=2, tensor=2), get_layout({"heads": "tensor", "batch": "expert", "expert": "expert"})),
]


@pytest.mark.parametrize("variant, sizes, layout", MESHES)
def test_batch_with_pictures_on_a_mesh(request, variant, sizes, layout):
    """Tokens reach their experts and come back to their places; heads, widths, rows and tiles are divided without a trace."""
    pair = request.getfixturevalue(variant)
    model = port(pair.reference, mesh=make_mesh(**sizes), layout=layout)
    picture, tiles = picture_prompt()
    lengths = [picture.shape[1], 53, 7, 16, 17, 40, 33, 1]
    ids = text_ids(8, max(lengths))
    ids[0] = picture
    ours = logits(model, ids, tiles, lengths)
    for row, length in enumerate(lengths):
        expected = pair.expected_logits(ids[row : row + 1, :length], tiles if row == 0 else None)[0]
        assert_allclose(ours[row, :length], expected, atol=TOLERANCE, rtol=0, err_msg=f"row {row} of {length} tokens")


@pytest.mark.parametrize(
    "sizes, layout, forms",
    [
        (dict(expert=8), THROUGHPUT, contextlib.nullcontext),
        (dict(data=2), THROUGHPUT, contextlib.nullcontext),
        (dict(expert=4, tensor=2), LATENCY, contextlib.nullcontext),
        (dict(expert=4, tensor=2), LATENCY, forms_for_tpu),
    ],
)
def test_one_row_on_many_devices(tiny_maverick, sizes, layout, forms):
    """A single long prompt is divided by its tokens: half chunks that need their neighbour's keys, whole chunks that need
    none, a cache of which every device holds a part, written and read one token at a time."""
    mesh = make_mesh(**sizes)
    model = port(tiny_maverick.reference, mesh=mesh, layout=layout)
    ids = text_ids(1, 72)
    assert not layout.sharding(PAGES, (8, 2, 16, 32), mesh).is_fully_replicated
    create = jax.jit(lambda: KVCache.create(model.config.text, 1, 128, jnp.float32, model.constrain))
    expected = tiny_maverick.expected_logits(ids)
    with forms():
        out, cache = cached_step(model, jnp.asarray(ids[:, :64]), jnp.array([64], jnp.int32), create())
        assert_allclose(np.asarray(out), expected[:, :64], atol=TOLERANCE, rtol=0)
        for position in range(64, 72):
            out, cache = cached_step(model, jnp.asarray(ids[:, position : position + 1]), jnp.array([1], jnp.int32), cache)
            assert_allclose(np.asarray(out)[:, 0], expected[:, position], atol=TOLERANCE, rtol=0, err_msg=f"token {position}")


def test_every_expert_lies_on_its_own_device(tiny_maverick):
    """Eight experts on eight devices: one each, not a copy of all on every device."""
    gate = port(tiny_maverick.reference, mesh=make_mesh(expert=8)).text.layers[1].feed_forward.experts.gate[...]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(1, 160, 96)}
    assert sorted(shard.index[0].start or 0 for shard in gate.addressable_shards) == list(range(8))
    assert len({shard.device for shard in gate.addressable_shards}) == len(jax.devices()) == 8
    whole = np.concatenate([np.asarray(s.data) for s in sorted(gate.addressable_shards, key=lambda s: s.index[0].start or 0)])
    assert (whole == np.asarray(tiny_maverick.model.text.layers[1].feed_forward.experts.gate[...])).all()


def gradients(model) -> dict:
    """Of a loss that weighs every logit differently, by parameter."""
    graphdef, state = nnx.split(model)
    ids = jnp.asarray(text_ids(8, 33))
    found = jax.jit(jax.grad(lambda state: jnp.sin(nnx.merge(graphdef, state)(ids)).mean()))(state)
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(found)}


@pytest.mark.parametrize("sizes", [dict(expert=8), dict(data=2, expert=2, tensor=2)], ids=str)
def test_gradients_of_a_whole_model(sizes):
    """Training mode with room for every token: each parameter's gradient is that of one device."""
    reference = make_model(Llama4TextConfig(**text_values("maverick", num_hidden_layers=2, no_rope_layers=[1, 0])))
    mesh = make_mesh(**sizes)
    training = AllToAll(mesh, THROUGHPUT, capacity_factor=mesh.shape["expert"], rounds=1)
    ours, expected = gradients(port(reference, mesh=mesh, dispatcher=training)), gradients(port(reference))
    assert ours.keys() == expected.keys()
    for path, gradient in expected.items():
        assert np.isfinite(ours[path]).all()
        assert np.abs(gradient).max() > 0
        assert_allclose(ours[path], gradient, atol=TOLERANCE * np.abs(gradient).max(), rtol=0, err_msg=str(path))
