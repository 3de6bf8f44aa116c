"""The training layout: what lies in parts is gathered one layer at a time, and gradients come back in parts, never whole on every device.

The compiled programs say so: a gradient that is summed whole, and then cut, is right too, and takes many times the room.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from numpy.testing import assert_allclose

from maverick_jax.ops.swiglu import ExpertWeights
from maverick_jax.plan.hlo import count_traffic
from maverick_jax.sharding import LATENCY, THROUGHPUT, TRAINING, AllToAll, AttendOnMesh, Constrain, Local, make_mesh
from maverick_jax.training import logits
from maverick_jax.training.logits import log_probabilities, over_pieces
from maverick_jax.training.split import Split
from maverick_jax.training.step import abstract_moments, begin
from maverick_jax.training.trainer import REMAT
from oracle.plain import plain_model

E, D, F, T, V = 8, 16, 24, 64, 64


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, expert=4)


def experts() -> tuple[jax.Array, jax.Array, ExpertWeights]:
    random = np.random.default_rng(0)
    x_TD, *w = (jnp.asarray(random.standard_normal(s, np.float32)) for s in ((T, D), (E, D, F), (E, D, F), (E, F, D)))
    return x_TD, jnp.asarray(random.integers(0, E, T), jnp.int32), ExpertWeights(*w)


def on(mesh, layout):
    dispatcher = AllToAll(mesh, layout, rounds=2)
    return plain_model(options=dict(dispatcher=dispatcher, attend=AttendOnMesh(mesh, layout), constrain=Constrain(mesh, layout)))


def placed(model, mesh, layout):
    for _, leaf in nnx.to_flat_state(nnx.state(model)):
        leaf.set_value(jax.device_put(leaf.get_value(), layout.sharding(leaf.get_metadata()["axes"], leaf.shape, mesh)))
    return model


@pytest.mark.parametrize("dispatcher", [Local, AllToAll])
def test_gradients_of_experts_are_scattered(mesh, dispatcher):
    """Over `data` each device keeps its own part of the sum: nothing is reduced whole, of all that is as large as a device's experts."""
    x_TD, expert_T, w = experts()
    axes = ("expert", "expert_embed", "expert_mlp"), ("expert", "expert_mlp", "expert_embed")
    places = ExpertWeights(*(TRAINING.sharding(axes[i], a.shape, mesh) for a, i in zip(w, (0, 0, 1), strict=True)))
    dispatch = dispatcher(mesh, TRAINING, **({"rounds": 2} if dispatcher is AllToAll else {}))
    gradient = jax.jit(jax.grad(lambda w: dispatch(x_TD, expert_T, w)[0].sum()), in_shardings=(places,), out_shardings=places)
    text = gradient.lower(w).compile().as_text()
    assert len(re.findall(r" reduce-scatter\(", text)) == 3, text
    whole = E // 4 * D * F
    assert all(np.prod([int(n) for n in shape.split(",")]) < whole for shape in re.findall(r"f32\[([\d,]+)\]\S* all-reduce\(", text))


@pytest.mark.parametrize("layout", [THROUGHPUT, LATENCY], ids=lambda layout: layout.name)
@pytest.mark.parametrize("dispatcher", [Local, AllToAll])
def test_inference_gathers_no_experts(mesh, dispatcher, layout):
    """Where experts lie whole, programs have nothing to put together."""
    assert "all_gather" not in jax.jit(dispatcher(mesh, layout)).lower(*experts()).as_text()


def test_rounds_that_nobody_needs_are_not_made(mesh, monkeypatch):
    """Further rounds stand in branches, which are not counted: with even loads a step sends its tokens once."""
    monkeypatch.setattr("maverick_jax.sharding.all_to_all.ONE_ROUND_TOKENS", 2)
    x_TD, _, w = experts()
    expert_T = jnp.arange(T, dtype=jnp.int32) % E

    def gradient(rounds):
        dispatch = AllToAll(mesh, THROUGHPUT, rounds=rounds)
        return jax.jit(jax.grad(lambda x, w: jnp.sin(dispatch(x, expert_T, w)[0]).sum(), argnums=(0, 1)))

    one, three = (count_traffic(gradient(rounds).lower(x_TD, w).compile().as_text()).collectives["all-to-all"] for rounds in (1, 3))
    assert one == three
    for once, thrice in zip(jax.tree.leaves(gradient(1)(x_TD, w)), jax.tree.leaves(gradient(3)(x_TD, w)), strict=True):
        assert_allclose(thrice, once, rtol=1e-6, atol=1e-6)


def test_layers_are_gathered_one_after_the_other(mesh):
    """Each waits for what comes into it, or all layers' experts would be put together at once."""
    model = on(mesh, TRAINING)

    def barriers() -> int:
        x_BTD, lengths_B = jnp.zeros((8, 8, 16)), jnp.full((8,), 8)
        return jax.jit(lambda x: model.hidden(x, lengths_B)[0]).lower(x_BTD).as_text().count("optimization_barrier")

    here = barriers()
    model.text.remat = REMAT["layers"]
    assert barriers() == here + model.config.text.num_hidden_layers


def test_the_unembedding_is_gathered_once(mesh, monkeypatch):
    """However many pieces the logits are made in; so is its gradient summed. Both are those of one device."""
    monkeypatch.setattr(logits, "PIECE", V * 2)
    here, there = plain_model(), placed(on(mesh, TRAINING), mesh, TRAINING)
    random = np.random.default_rng(0)
    hidden, target = random.standard_normal((8, 16, 16), np.float32), random.integers(0, V, (8, 16)).astype(np.int32)

    def gradients(model):
        graphdef, state = nnx.split(model)

        def loss(state, hidden):
            return over_pieces(nnx.merge(graphdef, state), hidden, log_probabilities, target).mean()

        places = jax.tree.map(lambda x: x.sharding, state)
        function = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=(places, None))
        of_state, of_hidden = function(state, hidden)
        return function.lower(state, hidden), of_state["text"]["unembedding"].get_value(), of_hidden

    _, *expected = gradients(here)
    program, *found = gradients(there)
    for one, other in zip(found, expected, strict=True):
        assert_allclose(np.asarray(one), np.asarray(other), atol=1e-6, rtol=0)
    collectives = count_traffic(program.compile().as_text()).collectives
    assert collectives["all-gather"].count == collectives["reduce-scatter"].count == 1, collectives


def test_the_embedding_stays_in_parts(mesh):
    """Rows are looked up in parts of their width, and so is their gradient added up: no device has a whole row of the table."""
    graphdef, state = nnx.split(on(mesh, TRAINING))
    ids = jnp.zeros((8, 16), jnp.int32)
    table = jax.ShapeDtypeStruct((V, 16), jnp.float32, sharding=TRAINING.sharding(("vocab", "table_embed"), (V, 16), mesh))
    weight = jax.ShapeDtypeStruct((8, 16, 16), jnp.float32, sharding=NamedSharding(mesh, TRAINING.spec(("batch",), (8,), mesh)))

    def loss(table, weight):
        state["text"]["embedding"] = state["text"]["embedding"].replace(table)
        return (nnx.merge(graphdef, state).embed(ids) * weight).sum()

    text = jax.jit(jax.grad(loss), out_shardings=table.sharding).lower(table, weight).compile().as_text()
    assert f"f32[{V},16]" not in text
    assert f"f32[{V},2]" in text


def test_moments_can_be_described(mesh):
    """Before anything is there: what a compiler is asked about is what a run begins with."""
    split, optimizer = Split(placed(on(mesh, TRAINING), mesh, TRAINING)), optax.adam(1e-3)

    def look(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)

    assert look(abstract_moments(split.learned, optimizer)) == look(begin(split, optimizer).moments)
