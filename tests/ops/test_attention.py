"""Attention: which keys a query sees, how heads share keys, and the temperature of the layers without RoPE."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from maverick_jax.model.attention import Piece
from maverick_jax.ops import attention as ops_attention
from maverick_jax.ops import attention_tpu
from maverick_jax.ops.attention import (
    QUERY_BLOCKS,
    Keys,
    Partial,
    attend,
    attend_apart,
    attend_in_order,
    attention,
    partial_attention,
    temperature_scale,
    visible,
)
from maverick_jax.ops.attention_tpu import causal_attention_tpu, suits
from oracle.programs import arrays_made


@pytest.mark.parametrize("chunk", [None, 1, 4, 16])
def test_visible_keys(chunk):
    """Not later, not empty, and in the same block of `chunk` tokens: no sliding window, the first of a block sees itself alone."""
    query = np.array([[0, 3, 4, 7, 8, 40], [5, 6, 7, 8, 9, 10]])
    key = np.array([[-1, 0, 3, 4, 5, 8, 39], [8, 9, 10, 3, 4, 5, -3]])
    mask = np.asarray(visible(jnp.asarray(query, jnp.int32), jnp.asarray(key, jnp.int32), chunk))
    for b in range(2):
        for t, q in enumerate(query[b]):
            for s, k in enumerate(key[b]):
                expected = 0 <= k <= q and (chunk is None or k // chunk == q // chunk)
                assert mask[b, t, s] == expected, f"query {q}, key {k}"


def test_consecutive_query_heads_share_a_key_head():
    """Query head h uses key head h // (H / K); interleaving them instead would still give plausible numbers."""
    random = np.random.default_rng(0)
    query, key, value = (random.standard_normal(s, np.float32) for s in ((1, 3, 6, 4), (1, 2, 5, 4), (1, 2, 5, 4)))
    mask = np.tril(np.ones((3, 5), bool), 2)[None]
    out = np.asarray(attention(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), jnp.asarray(mask)))
    for h in range(6):
        scores = np.where(mask[0], query[0, :, h] @ key[0, h // 3].T / 2, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        assert_allclose(out[0, :, h], weights / weights.sum(-1, keepdims=True) @ value[0, h // 3], atol=1e-5)


def random_heads(B, T, S, dtype="float32", sizes=(6, 2, 4)):
    """Six query heads on two key/value heads."""
    random = np.random.default_rng(T)
    H, K, d = sizes
    return (jnp.asarray(random.standard_normal(s), dtype) for s in ((B, T, H, d), (B, K, S, d), (B, K, S, d)))


def whole(query, key, value, positions, key_positions, chunk):
    """All scores at once, in float32."""
    mask = visible(positions, key_positions, chunk)
    return jax.jit(attention)(*(a.astype(jnp.float32) for a in (query, key, value)), mask)


@pytest.fixture
def few_scores(monkeypatch):
    """Blocks as in a context of a million tokens, with few tokens."""
    monkeypatch.setattr(ops_attention, "MOST_SCORES", 2**10)
    monkeypatch.setattr(ops_attention, "KEY_BLOCK", 32)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("chunk", [None, 48])
@pytest.mark.parametrize("T", [1, 64, 65, 200, 600])
def test_blocks_in_order_change_nothing(T, chunk, dtype, tolerance):
    """One block, a last block of one query, several, chunks as rows of their own: as all queries over all keys at once."""
    query, key, value = random_heads(2, T, T, dtype)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
    blocks = jax.jit(attend_in_order, static_argnums=3)(query, key, value, chunk)
    assert blocks.dtype == dtype
    assert_allclose(blocks.astype(jnp.float32), whole(query, key, value, positions, positions, chunk), atol=tolerance)


@pytest.mark.parametrize("chunk", [None, 48])
@pytest.mark.parametrize("T", [2, 65, 200])
def test_blocks_of_keys_change_nothing(few_scores, T, chunk):
    """The softmax is carried from block to block: over a wrapped cache, and from the start of a context."""
    query, key, value = random_heads(2, T, 100)
    positions = 90 + jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
    key_positions = jnp.stack([jnp.roll(jnp.arange(100, dtype=jnp.int32), 7), jnp.arange(-20, 80, dtype=jnp.int32)])
    blocks = jax.jit(attend, static_argnums=3)(query, positions, Keys(key, value, key_positions), chunk)
    expected = np.array(whole(query, key, value, positions, key_positions, chunk))
    sees_nothing = ~np.asarray(visible(positions, key_positions, chunk)).any(axis=-1)
    expected[sees_nothing], blocks = 0, np.where(sees_nothing[..., None, None], 0, blocks)
    assert_allclose(blocks, expected, atol=2e-6)
    query, key, value = random_heads(2, T, T)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
    blocks = jax.jit(attend_in_order, static_argnums=3)(query, key, value, chunk)
    assert_allclose(blocks, whole(query, key, value, positions, positions, chunk), atol=2e-6)


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("chunk", [None, 48])
def test_keys_in_parts_are_the_keys_together(T, chunk):
    """A cache and the new tokens, a part out of reach altogether: parts add up to the softmax over all."""
    query, key, value = random_heads(2, T, 100)
    positions = 90 + jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
    key_positions = jnp.stack([jnp.arange(100, dtype=jnp.int32), jnp.arange(-60, 40, dtype=jnp.int32).at[99].set(90)])
    parts = [Keys(key[:, :, a:b], value[:, :, a:b], key_positions[:, a:b]) for a, b in ((0, 30), (30, 99), (99, 100))]
    part = jax.jit(partial_attention, static_argnums=3)
    out = functools.reduce(Partial.merge, (part(query, positions, keys, chunk) for keys in parts)).finish(query.dtype)
    seen = np.asarray(visible(positions, key_positions, chunk)).any(axis=-1)
    assert seen[:, 0].all()
    assert_allclose(out[seen], whole(query, key, value, positions, key_positions, chunk)[seen], atol=2e-6)


def test_the_gradient_by_blocks(few_scores):
    """Blocks that are computed again in the backward pass give the gradient of the whole."""
    T = 150
    query, key, value = random_heads(1, T, T)
    positions = jnp.arange(T, dtype=jnp.int32)[None]

    def gradient(attending):
        return jax.grad(lambda *heads: jnp.sin(attending(*heads)).sum(), argnums=(0, 1, 2))(query, key, value)

    blocks = gradient(lambda q, k, v: attend_in_order(q, k, v, None))
    for ours, expected in zip(blocks, gradient(lambda q, k, v: whole(q, k, v, positions, positions, None)), strict=True):
        assert_allclose(ours, expected, atol=1e-5)


def test_a_long_context_makes_no_square(few_scores):
    """No array of T x S scores, forward or backward: at a million tokens one head's would take 4 TB."""
    T = 512
    query, key, value = random_heads(1, T, T)

    def loss(query, key, value):
        return attend_in_order(query, key, value, None).sum()

    sizes = [v.aval.size for eqn in jax.make_jaxpr(jax.grad(loss))(query, key, value).eqns for v in eqn.outvars]
    assert max(sizes) < T * T


def test_a_gradient_keeps_no_row_of_blocks(few_scores):
    """Of a block of queries, the scores of one block of keys at a time: those of 8,192 keys were most of a training step's traffic."""
    T, size = 512, QUERY_BLOCKS[0]
    query, key, value = random_heads(1, T, T)
    loss = jax.jit(jax.grad(lambda *heads: attend_in_order(*heads, None).sum(), argnums=(0, 1, 2)))
    made = arrays_made(loss.lower(query, key, value).compile())
    assert max(math.prod(array.shape) for array in made) < size * 6 * T


def test_the_kernel_for_tpu():
    """The same attention, query heads with their key heads, scaled once."""
    random = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(random.standard_normal(s), jnp.float32) for s in ((1, 1024, 4, 128), (1, 2, 1024, 128), (1, 2, 1024, 128))
    )
    kernel = functools.partial(causal_attention_tpu, interpret=True)
    assert_allclose(kernel(query, key, value), ops_attention._causal(query, key, value), atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 256])
def test_the_kernel_for_documents(chunk, monkeypatch):
    """The same attention, and gradients, where each sees itself alone, as far back as its chunk begins."""
    monkeypatch.setattr(attention_tpu, "causal_attention_tpu", functools.partial(causal_attention_tpu, interpret=True))
    monkeypatch.setattr(attention_tpu, "suits", lambda T, d, dtype: True)  # float32 as well, which is exact here
    query, key, value = random_heads(1, 1024, 1024, sizes=(2, 1, 128))
    piece = Piece.packed(jnp.repeat(jnp.array([0, 1, 2, -1]), jnp.array([300, 500, 130, 94]), total_repeat_length=1024)[None])
    positions_BT, room = piece.apart(chunk)

    def learned(form):
        """Of real tokens: what padding sees is nobody's."""

        def real(query, key, value):
            return jnp.where(piece.real_BT[..., None, None], form(query, positions_BT, key, value, room), 0)

        out, pull = jax.vjp(real, query, key, value)
        return out, *pull(jnp.cos(out))

    for found, expected in zip(learned(ops_attention._apart_tpu), learned(ops_attention._apart), strict=True):
        assert_allclose(found, expected, atol=2e-5)


def test_rows_of_documents_have_a_form_for_tpu():
    """Traced on a CPU too: the kernel, where it takes the shape; short rows, and float32, go by blocks."""

    def kernels(T, dtype):
        query, key, value = random_heads(1, T, T, dtype, sizes=(2, 1, 128))
        positions = jnp.arange(T, dtype=jnp.int32)[None]
        return str(jax.make_jaxpr(lambda *heads: attend_apart(heads[0], positions, *heads[1:], T))(query, key, value)).count("pallas_call")

    assert kernels(1024, "bfloat16") == 1
    assert (kernels(512, "bfloat16"), kernels(1024, "float32")) == (0, 0)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_long_prompts_have_a_form_for_each_platform(dtype, tolerance):
    """TPU's kernel and cuDNN are traced on a CPU too, which has neither, and change nothing there."""
    query, key, value = random_heads(1, 1030, 1030, dtype)
    positions = jnp.arange(1030, dtype=jnp.int32)[None]
    out = jax.jit(attend_in_order, static_argnums=3)(query, key, value, None)
    assert_allclose(out.astype(jnp.float32), whole(query, key, value, positions, positions, None), atol=tolerance)


@pytest.mark.parametrize("T, d, good", [(1024, 128, True), (8192, 128, True), (1000, 128, False), (1024, 64, False), (2**17, 128, False)])
def test_shapes_for_the_kernel(T, d, good):
    """What the kernel refuses, would prepare for minutes, or multiplies in fewer bits goes by blocks."""
    assert suits(T, d, jnp.bfloat16) is good
    assert not suits(T, d, jnp.float32)


def test_a_query_that_sees_nothing_stays_finite():
    """Padding queries see no key; a NaN of theirs would spread through the expert dispatch."""
    out = attention(jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 3, 4)), jnp.ones((1, 1, 3, 4)), jnp.zeros((1, 1, 3), bool))
    assert np.isfinite(out).all()


def test_temperature_is_one_below_the_first_step():
    """Exactly 1 before position 8191, so that short prompts are untouched; 1 + 0.1 ln 2 from there (spec section 2.2)."""
    positions = jnp.array([0, 1, 8190, 8191, 16382, 16383], jnp.int32)
    scale = np.asarray(temperature_scale(positions, floor_scale=8192, attn_scale=0.1))
    assert (scale[:3] == 1).all()
    assert_allclose(scale[3:], 1 + 0.1 * np.log([2, 2, 3]), rtol=1e-6)


def test_temperature_steps_at_a_million_tokens():
    """Every step begins at its own token: positions in bfloat16 would take a wrong step for one token in six."""
    steps = np.arange(1, 129)
    border = jnp.asarray(steps * 8192 - 1, jnp.int32)
    assert_allclose(np.asarray(temperature_scale(border, floor_scale=8192, attn_scale=0.1)), 1 + 0.1 * np.log1p(steps), rtol=1e-6)
    before = temperature_scale(border - 1, floor_scale=8192, attn_scale=0.1)
    assert_allclose(np.asarray(before), 1 + 0.1 * np.log1p(steps - 1), rtol=1e-6)
