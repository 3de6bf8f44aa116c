"""Every dispatcher is the dense sum over experts, forward and gradient, however unevenly tokens are routed.

Shape suffixes: T tokens, D model width, E experts, F expert width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from maverick_jax.ops.swiglu import ExpertWeights
from maverick_jax.sharding import THROUGHPUT, AllToAll, Local, Stats, all_to_all, make_mesh

E, D, F, T = 8, 16, 24, 100
RELATIVE = 1e-4  # float32 sums in another order
MESHES = [dict(expert=8), dict(data=2, expert=2, tensor=2)]
ROUTINGS = ["random", "one expert", "half padding", "all padding", "two of a device"]


def tokens_and_experts():
    random = np.random.default_rng(0)
    x_TD, gate, up, down = (jnp.asarray(random.standard_normal(s, np.float32)) for s in ((T, D), (E, D, F), (E, D, F), (E, F, D)))
    return x_TD, ExpertWeights(gate, up, down)


def routing(kind: str) -> jax.Array:
    """[T] expert of each token; E is padding."""
    expert_T = np.random.default_rng(1).integers(0, E, T)
    if kind == "one expert":
        expert_T[:] = 5
    elif kind == "half padding":
        expert_T[::2] = E
    elif kind == "all padding":
        expert_T[:] = E
    elif kind == "two of a device":
        expert_T = 2 + expert_T % 2
    return jnp.asarray(expert_T, jnp.int32)


def dense(x_TD, expert_T, w):
    """Every expert on every token, all but the chosen one multiplied by zero: no sorting, no sending, no loop."""
    hidden_TEF = jax.nn.silu(jnp.einsum("TD,EDF->TEF", x_TD, w.gate_EDF)) * jnp.einsum("TD,EDF->TEF", x_TD, w.up_EDF)
    chosen_TE = jax.nn.one_hot(expert_T, E, dtype=x_TD.dtype)  # a row of zeros for padding
    return jnp.einsum("TEF,EFD,TE->TD", hidden_TEF, w.down_EFD, chosen_TE)


@pytest.fixture
def small_buffers(monkeypatch):
    """Buffers below a device's tokens, as in a long prefill, though the test has few tokens."""
    monkeypatch.setattr(all_to_all, "ONE_ROUND_TOKENS", 2)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def mesh(request):
    return make_mesh(**request.param)


def close(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(a).all()
        assert_allclose(np.asarray(a), np.asarray(b), atol=RELATIVE * max(1.0, float(np.abs(b).max())), rtol=0)


@pytest.mark.parametrize("kind", ROUTINGS)
def test_local_is_the_dense_sum(kind):
    """Sorted to their experts and back, tokens keep their places; padding gives zero and counts for no expert."""
    x_TD, w = tokens_and_experts()
    expert_T = routing(kind)
    y_TD, stats = jax.jit(Local())(x_TD, expert_T, w)
    close(y_TD, dense(x_TD, expert_T, w))
    assert stats.load_E.tolist() == np.bincount(expert_T, minlength=E + 1)[:E].tolist()
    assert int(stats.dropped) == 0


@pytest.mark.parametrize("capacity_factor", [0.1, 1.0, 8.0])
def test_inference_drops_no_token(mesh, small_buffers, capacity_factor):
    """What does not fit goes in another round, on every device alike, or the collectives would hang or tokens vanish."""
    x_TD, w = tokens_and_experts()
    dispatcher = jax.jit(AllToAll(mesh, THROUGHPUT, capacity_factor=capacity_factor))
    for kind in ROUTINGS:
        expert_T = routing(kind)
        y_TD, stats = dispatcher(x_TD, expert_T, w)
        close(y_TD, dense(x_TD, expert_T, w))
        assert stats.load_E.tolist() == np.bincount(expert_T, minlength=E + 1)[:E].tolist()
        assert int(stats.dropped) == 0


def test_few_tokens_need_no_loop(mesh):
    """Decode of a few rows, a number that no mesh divides: one round without a `while_loop`."""
    x_TD, w = tokens_and_experts()
    dispatcher = AllToAll(mesh, THROUGHPUT)
    expert_T = routing("random")
    assert "while" not in str(jax.make_jaxpr(lambda x, e, w: dispatcher(x, e, w)[0])(x_TD[:3], expert_T[:3], w)).split("all_to_all")[0]
    y_TD, _ = jax.jit(dispatcher)(x_TD[:3], expert_T[:3], w)
    close(y_TD, dense(x_TD[:3], expert_T[:3], w))


@functools.cache
def value_and_gradients(dispatcher):
    """Of a loss that weighs every output differently, for tokens and weights; with what was dropped."""

    def loss(x_TD, w, expert_T):
        y_TD, stats = dispatcher(x_TD, expert_T, w)
        return jnp.sin(y_TD).sum(), stats.dropped

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def dense_dispatcher(x_TD, expert_T, w):
    return dense(x_TD, expert_T, w), Stats(jnp.zeros((), jnp.int32), None)


def check_gradients(dispatcher, reference):
    x_TD, w = tokens_and_experts()
    for kind in ("random", "one expert", "half padding"):
        ours, expected = (value_and_gradients(d)(x_TD, w, routing(kind)) for d in (dispatcher, reference))
        assert int(ours[0][1]) == 0
        close(ours, expected)


def test_gradients_of_local():
    """The hand-written gradient of the grouped matmul is that of the dense sum."""
    check_gradients(Local(), dense_dispatcher)


@pytest.mark.parametrize("rounds", [1, 2])
def test_gradients_of_training_mode(mesh, small_buffers, rounds):
    """A fixed number of rounds with room for all: nothing is dropped and Local's gradients come out."""
    check_gradients(AllToAll(mesh, THROUGHPUT, capacity_factor=mesh.shape["expert"] / rounds, rounds=rounds), Local())


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_training_counts_what_it_drops(small_buffers, rounds):
    """Too little room is reported to the token; the tokens that found room are right and the others give zero."""
    mesh, expert_T = make_mesh(expert=8), routing("one expert")
    x_TD, w = tokens_and_experts()
    y_TD, stats = jax.jit(AllToAll(mesh, THROUGHPUT, capacity_factor=2.0, rounds=rounds))(x_TD, expert_T, w)
    per_device = np.bincount(np.arange(T) // 13, minlength=8)  # 100 tokens on 8 devices: 13 each, 9 on the last
    capacity = 4  # of 2.0 * 13 / 8 rows per destination
    assert int(stats.dropped) == np.maximum(per_device - capacity * rounds, 0).sum()
    kept = np.arange(T) % 13 < capacity * rounds
    close(y_TD, jnp.where(jnp.asarray(kept)[:, None], dense(x_TD, expert_T, w), 0))
