"""Attention: which keys a query sees, how heads share keys, and the temperature of the layers without RoPE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from maverick_jax.ops.attention import attention, causal_attention, temperature_scale, visible


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


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("T", [1, 64, 65, 200, 600])
def test_blocks_of_queries_change_nothing(T, dtype, tolerance):
    """One block, a last block of one query, several, and more than the eighth part: as all queries at once."""
    random = np.random.default_rng(T)
    query, key, value = (jnp.asarray(random.standard_normal(s), dtype) for s in ((2, T, 6, 4), (2, 2, T, 4), (2, 2, T, 4)))
    positions = jnp.arange(T, dtype=jnp.int32)[None] + jnp.array([[0], [30]], jnp.int32)
    mask = visible(positions, positions, 48)
    blocks = jax.jit(causal_attention)(query, key, value, mask)
    assert blocks.dtype == dtype
    whole = jax.jit(attention)(*(a.astype(jnp.float32) for a in (query, key, value)), mask)
    assert_allclose(blocks.astype(jnp.float32), whole, atol=tolerance)


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
