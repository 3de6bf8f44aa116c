"""Every dispatcher is the dense sum over experts, forward and gradient, however unevenly tokens are routed.

Shape suffixes: T tokens, D model width, E experts, F expert width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from maverick_jax.errors import UserError
from maverick_jax.ops.swiglu import ExpertWeights
from maverick_jax.sharding import (
    LATENCY,
    THROUGHPUT,
    TRAINING,
    AllToAll,
    Layout,
    Local,
    Ragged,
    Stats,
    all_to_all,
    get_layout,
    make_dispatcher,
    make_mesh,
    wire,
)

E, D, F, T = 8, 16, 24, 100
OUTPUTS, GRADIENTS = 1e-5, 1e-4  # relative to the largest: float32 sums in another order
MESHES = [dict(expert=8), dict(data=2, expert=2, tensor=2)]
ROUTINGS = ["random", "one expert", "half padding", "all padding", "two of a device"]
# Experts over two mesh axes, their width over the third, tokens on all of them: nobody's preset.
WIDE = get_layout({"tokens": ("data", "expert", "tensor"), "expert": ("data", "expert"), "expert_mlp": "tensor"})
COMBINATIONS = [
    (dispatcher, layout, sizes)
    for dispatcher in (Local, AllToAll, Ragged)
    for layout, sizes in [
        (THROUGHPUT, dict(expert=8)),
        (THROUGHPUT, dict(data=2, expert=2, tensor=2)),
        (THROUGHPUT, dict(data=2, expert=4)),
        (THROUGHPUT, dict(tensor=8)),
        (LATENCY, dict(expert=2, tensor=4)),
        (LATENCY, dict(data=2, expert=2, tensor=2)),
        (TRAINING, dict(data=4, expert=2)),
        (WIDE, dict(data=2, expert=2, tensor=2)),
    ]
]


def named(value) -> str | None:
    """Short ids: `AllToAll-throughput-data=2,expert=4`."""
    if isinstance(value, dict):
        return ",".join(f"{axis}={size}" for axis, size in value.items())
    return value.name if isinstance(value, Layout) else getattr(value, "__name__", None)


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


def close(ours, expected, relative=OUTPUTS):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(a).all()
        assert_allclose(np.asarray(a), np.asarray(b), atol=relative * max(1.0, float(np.abs(b).max())), rtol=0)


@pytest.mark.parametrize("dispatcher, layout, sizes", COMBINATIONS, ids=named)
def test_all_combinations_are_the_dense_sum(small_buffers, dispatcher, layout, sizes):
    """However tokens and experts lie, however few there are and wherever they go: the same sum, and no token dropped."""
    x_TD, w = tokens_and_experts()
    dispatch = jax.jit(dispatcher(make_mesh(**sizes), layout))
    for tokens, kinds in ((T, ROUTINGS), (13, ROUTINGS[:2]), (1, ROUTINGS[:1])):
        for kind in kinds:
            expert_T = routing(kind)[:tokens]
            y_TD, stats = dispatch(x_TD[:tokens], expert_T, w)
            close(y_TD, dense(x_TD[:tokens], expert_T, w))
            assert stats.load_E.tolist() == np.bincount(expert_T, minlength=E + 1)[:E].tolist()
            assert int(stats.dropped) == 0


@pytest.mark.parametrize(
    "dispatcher, layout, sizes", [c for c in COMBINATIONS if c[0] is not AllToAll or c[1] is not THROUGHPUT], ids=named
)
def test_gradients_of_all_combinations(dispatcher, layout, sizes):
    """Training mode with room for all gives the dense sum's gradients, of tokens and weights."""
    mesh = make_mesh(**sizes)
    check_gradients(dispatcher(mesh, layout) if dispatcher is Local else dispatcher(mesh, layout, capacity_factor=8, rounds=1))


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
        # Linear, so that what a narrow wire does to y cannot turn the gradient that arrives.
        weight_TD = jnp.sin(jnp.arange(y_TD.size, dtype=y_TD.dtype)).reshape(y_TD.shape)
        return (y_TD * weight_TD).sum(), stats.dropped

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def dense_dispatcher(x_TD, expert_T, w):
    return dense(x_TD, expert_T, w), Stats(jnp.zeros((), jnp.int32), None)


def check_gradients(dispatcher):
    x_TD, w = tokens_and_experts()
    for kind in ("random", "one expert", "half padding"):
        ours, expected = (value_and_gradients(d)(x_TD, w, routing(kind)) for d in (dispatcher, dense_dispatcher))
        assert int(ours[0][1]) == 0
        close(ours, expected, GRADIENTS)


def test_gradients_of_local():
    """The hand-written gradient of the grouped matmul is that of the dense sum."""
    check_gradients(Local())


@pytest.mark.parametrize("rounds", [1, 2])
def test_gradients_of_training_mode(mesh, small_buffers, rounds):
    """A fixed number of rounds with room for all: nothing is dropped and the dense sum's gradients come out."""
    check_gradients(AllToAll(mesh, THROUGHPUT, capacity_factor=mesh.shape["expert"] / rounds, rounds=rounds))


@pytest.mark.parametrize("dispatcher", [AllToAll, Ragged])
@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
def test_no_gradient_through_as_many_rounds_as_needed(small_buffers, dispatcher, transform):
    """jax's own error speaks of a `while_loop` from deep inside; ours says what to do. Without a gradient nothing changes."""
    mesh, (x_TD, w) = make_mesh(expert=4), tokens_and_experts()
    call = transform(lambda x_TD: dispatcher(mesh, THROUGHPUT)(x_TD, routing("random"), w)[0].sum())
    jax.eval_shape(call, x_TD)
    with pytest.raises(UserError, match=r"dispatcher=AllToAll\(mesh, layout, rounds=2\)"):
        jax.eval_shape(jax.grad(call), x_TD)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(rounds=0), "rounds=0 of a dispatcher: give a whole number from 1"),
        (dict(rounds=1.5), "rounds=1.5 of a dispatcher: give a whole number from 1"),
        (dict(capacity_factor=0), "capacity_factor=0 of a dispatcher: give a number above 0"),
        (dict(capacity_factor=float("nan")), "capacity_factor=nan of a dispatcher: give a number above 0"),
        (dict(wire="float8"), "wire='float8' of a dispatcher: choose one of None, 'bfloat16', 'float8_e4m3fn'"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    """They would send no token, or raise from inside the first trace."""
    with pytest.raises(UserError, match=message):
        AllToAll(make_mesh(expert=2), THROUGHPUT, **settings)


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


def test_ragged_training_counts_what_it_drops(small_buffers):
    """One stream per receiver, cut after its room: what the last senders wanted to add is counted."""
    mesh, expert_T = make_mesh(expert=8), routing("one expert")
    x_TD, w = tokens_and_experts()
    y_TD, stats = jax.jit(Ragged(mesh, THROUGHPUT, capacity_factor=2.0, rounds=2))(x_TD, expert_T, w)
    room = 2 * 2 * 13  # rounds times factor times a device's tokens
    assert int(stats.dropped) == T - room
    close(y_TD, jnp.where(jnp.arange(T)[:, None] < room, dense(x_TD, expert_T, w), 0))


@pytest.mark.parametrize("sent, relative", [("bfloat16", 2**-6), (wire.FP8, 2**-2)])
def test_narrow_wires(mesh, small_buffers, sent, relative):
    """Half or a quarter of the bytes travel; what that costs stays in proportion to the rounding, and is not nothing."""
    x_TD, w = tokens_and_experts()
    expert_T = routing("random")
    dispatcher = AllToAll(mesh, THROUGHPUT, wire=sent)
    y_TD, _ = jax.jit(dispatcher)(x_TD, expert_T, w)
    expected = dense(x_TD, expert_T, w)
    error = float(jnp.sqrt(jnp.square(y_TD - expected).mean() / jnp.square(expected).mean()))
    assert relative / 64 < error < relative / 2
    text = jax.jit(dispatcher).lower(x_TD, expert_T, w).as_text()
    assert {"bfloat16": "bf16", wire.FP8: "ui8"}[sent] in " ".join(line for line in text.splitlines() if "all_to_all" in line)


def test_gradients_pass_a_narrow_wire():
    """The rounding to FP8 has no gradient of its own: it is passed on as it is, or nothing behind the wire would learn."""
    x_TD, w = tokens_and_experts()
    mesh, expert_T = make_mesh(expert=8), routing("random")
    ours, exact = (
        value_and_gradients(AllToAll(mesh, THROUGHPUT, capacity_factor=8, rounds=1, wire=sent))(x_TD, w, expert_T)[1][1].down_EFD
        for sent in (wire.FP8, None)
    )
    cosine = float((ours * exact).sum() / jnp.sqrt(jnp.square(ours).sum() * jnp.square(exact).sum()))
    assert 0.9 < cosine < 0.99999


def test_the_backward_pass_scatters_no_rows():
    """A gather by the inverse permutation does it; a scatter-add of rows is far slower on accelerators."""
    x_TD, w = tokens_and_experts()
    for dispatcher in (Local(), AllToAll(make_mesh(expert=8), THROUGHPUT, capacity_factor=8, rounds=1)):
        text = value_and_gradients(dispatcher).lower(x_TD, w, routing("random")).as_text()
        scatters = [line for line in text.splitlines() if "stablehlo.scatter" in line]
        assert not [line for line in scatters if "xf32>" in line]  # of numbers of rows, there are some


def test_three_all_to_alls():
    """Two for the tokens, one that says for which expert they are."""
    x_TD, w = tokens_and_experts()
    text = jax.jit(AllToAll(make_mesh(expert=8), THROUGHPUT)).lower(x_TD, routing("random"), w).as_text()
    assert text.count("stablehlo.all_to_all") == 3


def test_the_layout_chooses_the_dispatcher():
    """Whole experts on several devices call for an all-to-all; where every device holds a part of each, tokens stay."""
    mesh = make_mesh(expert=4, tensor=2)
    assert make_dispatcher(None, THROUGHPUT) == Local()
    assert make_dispatcher(make_mesh(), THROUGHPUT) == Local()
    assert make_dispatcher(mesh, THROUGHPUT) == AllToAll(mesh, THROUGHPUT)
    assert make_dispatcher(mesh, LATENCY) == Local(mesh, LATENCY)
    assert make_dispatcher(mesh, THROUGHPUT, "ragged") == Ragged(mesh, THROUGHPUT)
    mine = AllToAll(mesh, THROUGHPUT, wire="bfloat16")
    assert make_dispatcher(mesh, THROUGHPUT, mine) is mine
    with pytest.raises(UserError, match="dispatcher 'pigeon' is unknown: choose one of local, all_to_all, ragged"):
        make_dispatcher(mesh, THROUGHPUT, "pigeon")
    for mistake in (7, AllToAll, ["local"]):  # a class instead of what it makes, among others
        with pytest.raises(UserError, match=r"is unknown: choose one of local, all_to_all, ragged, or pass one that is made"):
            make_dispatcher(mesh, THROUGHPUT, mistake)
