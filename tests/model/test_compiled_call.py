"""A call outside `jit`: one program per shape, right whatever becomes of the weights; inside a transformation it is part of that."""

import copy
import gc
import itertools
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from numpy.testing import assert_allclose

import maverick_jax as mj
from maverick_jax.inference.cache import KVCache
from maverick_jax.model.parameter import ones
from maverick_jax.model.text import Text
from maverick_jax.sharding import THROUGHPUT, AttendOnMesh, Constrain, make_dispatcher, make_mesh
from oracle.forward import logits
from oracle.plain import plain_config, plain_model

SMALL = dict(num_hidden_layers=1, moe_layers=(), nope_layers=())
MIXTURE = dict(num_hidden_layers=1, moe_layers=(0,), nope_layers=())
IDS = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32)
_compiled: list[str] = []


@jax.monitoring.register_event_duration_secs_listener
def _count(event: str, seconds: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


@pytest.fixture
def model():
    return plain_model(**SMALL)


@pytest.fixture
def programs():
    """How many programs have been compiled since it was last asked."""

    def count() -> int:
        found = len(_compiled)
        _compiled.clear()
        return found

    count()
    return count


def test_one_program_per_shape(model, programs):
    """Operation by operation a call on eight simulated devices took 37 s, every time."""
    jax.clear_caches()
    model(IDS)
    assert programs() == 1
    model(IDS + 1)
    model(IDS.tolist(), lengths=[4, 4])
    model.text.norm[...] = model.text.norm[...] * np.float32(2)
    programs()
    model(IDS)
    plain_model(**SMALL)(IDS)  # another model of the same build
    assert programs() <= 1  # the random numbers of its weights are no program
    model(IDS[:, :3])
    assert programs() == 1


def changed_weight(model):
    model.text.norm[...] = 2 * model.text.norm[...]
    return model


def changed_by_update(model):
    nnx.update(model, jax.tree.map(lambda weight: weight * np.float32(0.9), nnx.state(model)))
    return model


def replaced_parameter(model):
    model.text.norm = ones((16,), ("embed",), jnp.float32)
    return model


def replaced_module(model):
    model.text.layers[0].feed_forward = plain_model(**MIXTURE).text.layers[0].feed_forward
    return model


def changed_setting(model):
    model.text.eps = 0.5
    return model


ITSELF = (lambda model: model,)
COPIES = (nnx.clone, copy.deepcopy, lambda model: nnx.merge(*nnx.split(model), copy=True), lambda model: pickle.loads(pickle.dumps(model)))


@pytest.mark.parametrize(
    "again, change",
    [
        *itertools.product(ITSELF, [changed_weight, changed_by_update, replaced_parameter, replaced_module, changed_setting]),
        *itertools.product(COPIES, [changed_weight]),
    ],
    ids=["weight", "update", "parameter", "module", "setting", "clone", "deepcopy", "merge", "pickle"],
)
def test_what_becomes_of_a_model_shows(model, again, change):
    """A program that was kept must not answer for a model that has changed, nor for the one it was copied from."""
    before = np.asarray(model(IDS))
    changed = change(again(model))
    expected = logits(changed, IDS)
    assert np.abs(expected - before).max() > 1e-3
    assert_allclose(changed(IDS), expected, atol=1e-5)
    if changed is not model:
        assert (model(IDS) == before).all()


def test_a_dead_model_leaves_nothing_behind():
    """Its weights may be most of the memory there is."""
    model = plain_model(**SMALL)
    model(IDS)
    weight = weakref.ref(model.text.layers[0].feed_forward.gate[...])
    del model
    gc.collect()
    assert weight() is None


def test_a_cache_can_be_continued_twice(model):
    """It was not donated: both continuations see what it held."""
    empty = KVCache.create(model.config.text, 2, 8, jnp.float32)
    _, held = model(IDS, cache=empty)
    first, after = model(IDS[:, :1], cache=held)
    again, _ = model(IDS[:, :1], cache=held)
    assert (first == again).all()
    assert (held.lengths_B.tolist(), after.lengths_B.tolist()) == ([4, 4], [5, 5])
    assert_allclose(first, logits(model, np.concatenate([IDS, IDS[:, :1]], axis=1))[:, 4:], atol=1e-5)


def test_inputs_may_lie_on_another_device(model):
    """Ids that were put on one device met a model on another one in an error of jax."""
    elsewhere = jax.device_put(IDS, jax.devices()[3])
    assert (model(elsewhere, lengths=jax.device_put(np.array([4, 4]), jax.devices()[2])) == model(IDS)).all()


def mean(model, ids):
    return model(ids).mean()


@pytest.mark.parametrize(
    "transformed",
    [
        jax.jit(lambda model, ids: model(ids)),
        nnx.jit(lambda model, ids: model(ids)),
        jax.jit(jax.checkpoint(lambda model, ids: model(ids))),
        jax.jit(lambda model, ids: jax.vmap(lambda row: model(row[None])[0])(ids)),
        jax.jit(lambda model, ids: jax.linearize(lambda model: model(ids), model)[0]),
    ],
    ids=["jit", "nnx.jit", "checkpoint", "vmap", "linearize"],
)
def test_under_a_transformation(model, transformed):
    assert_allclose(transformed(model, IDS), model(IDS), atol=1e-5)


def test_it_is_traced_where_it_stands(model, monkeypatch):
    """A program within a program would hide the model from whoever looks at it, and stay as it was first seen."""
    model(IDS)
    traced = jax.make_jaxpr(lambda model, ids: model(ids))(model, IDS)
    assert "program" not in {equation.params.get("name") for equation in traced.eqns}
    assert jax.eval_shape(model, IDS).shape == (2, 4, 64)
    monkeypatch.setattr(Text, "logits", lambda self, x: x)
    assert jax.eval_shape(lambda ids: model(ids), IDS).shape == (2, 4, 16)


def test_gradients(model):
    """Of a model, or of a part of its weights and outside `jit`."""
    expected = jax.jit(jax.grad(mean))(model, IDS)
    for ours, theirs in zip(jax.tree.leaves(nnx.jit(nnx.grad(mean))(model, IDS)), jax.tree.leaves(expected), strict=True):
        assert_allclose(ours, theirs, atol=1e-5)
    norm = nnx.grad(mean, argnums=nnx.DiffState(0, lambda path, _: path[-1] == "norm"))(model, IDS)
    assert_allclose(jax.tree.leaves(norm)[0], expected.text.norm[...], atol=1e-5)


def test_without_jit(model):
    """A debugger in the middle of a layer sees numbers."""
    expected = model(IDS)
    with jax.disable_jit():
        assert_allclose(model(IDS), expected, atol=1e-5)


def test_calls_that_nobody_waits_for():
    """On simulated devices many calls in flight end in a rendezvous that never comes: each is finished when it returns."""
    mesh = make_mesh(data=2, expert=4)
    placed = mesh, THROUGHPUT
    options = dict(dispatcher=make_dispatcher(*placed), constrain=Constrain(*placed), attend=AttendOnMesh(*placed))
    model = plain_model(options=options, **MIXTURE)
    nnx.update(model, jax.device_put(nnx.state(model), jax.NamedSharding(mesh, PartitionSpec())))
    many = [model(IDS) for _ in range(50)]
    assert all(one.is_ready() for one in many)
    assert_allclose(many[-1], logits(plain_model(**MIXTURE), IDS), atol=1e-5)


def test_a_model_shows_itself_in_a_line():
    """flax prints every parameter: forty pages for Maverick."""
    model = plain_model(**MIXTURE)
    mesh = make_mesh(data=2, expert=4)
    on_mesh = jax.device_put(nnx.state(model), jax.NamedSharding(mesh, PartitionSpec()))
    counts = "Llama4(1 layers, 1 with 4 experts, 8,688 parameters, float32"
    assert f"{model}" == repr(model) == f"{counts}, on one device)"
    assert repr(nnx.merge(nnx.graphdef(model), on_mesh)) == f"{counts}, on data=2, expert=4, tensor=1)"
    assert repr(mj.get_abstract_model(mj.Config.maverick())) == (
        "Llama4(48 layers, 24 with 128 experts, vision, 401,583,781,376 parameters, bfloat16, no weights)"
    )
    cache = KVCache.create(plain_config(**MIXTURE).text, 2, 8, jnp.float32)
    assert repr(cache) == "KVCache(1 layers, 2 rows of up to 8 tokens, [0, 0] in them)"
    for seen in (jax.eval_shape(lambda: cache), jax.tree.map(lambda _: None, cache)):
        assert repr(seen) == "KVCache(1 layers, rows of up to 8 tokens)"
