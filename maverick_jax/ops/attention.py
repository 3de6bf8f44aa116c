"""Grouped-query attention with causal and chunk masks made from positions, and Llama 4's attention temperature.

Shape suffixes: B batch, T query tokens, S key slots, H query heads, K key/value heads, G query heads per key/value
head, d head size.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a padding query which sees no key stays finite too
BLOCKS = 8  # of queries: seven sixteenths of the scores are never made
SHORTEST_BLOCK = 64


def visible(query_positions: jax.Array, key_positions: jax.Array, chunk: int | None) -> jax.Array:
    """Which keys a query sees: not later than itself and, with a chunk, in the same chunk.

    Args:
      query_positions: [B, T] int32.
      key_positions: [B, S] int32; negative marks an empty slot.
      chunk: tokens per chunk, or None for full causal attention. Chunks are blocks, not a sliding window.

    Returns:
      [B, T, S] bool.
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    mask = (key <= query) & (key >= 0)
    if chunk is not None:
        mask &= key // chunk == query // chunk
    return mask


def attention(query_BTHd: jax.Array, key_BKSd: jax.Array, value_BKSd: jax.Array, mask_BTS: jax.Array | None) -> jax.Array:
    """Softmax attention in float32, H // K consecutive query heads sharing one key/value head.

    Args:
      mask_BTS: True where a query sees a key; None: everything is seen (vision).

    Returns:
      [B, T, H, d] in the query's dtype.
    """
    B, T, H, d = query_BTHd.shape
    query = query_BTHd.reshape(B, T, key_BKSd.shape[1], -1, d)
    scores_BKGTS = jnp.einsum("BTKGd,BKSd->BKGTS", query, key_BKSd, preferred_element_type=jnp.float32) * d**-0.5
    if mask_BTS is not None:
        scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)
    weights = jax.nn.softmax(scores_BKGTS, axis=-1).astype(value_BKSd.dtype)
    # Asked for BTKGd at once, einsum swaps the operands, and XLA:CPU has no such bfloat16 product.
    out_BKGTd = jnp.einsum("BKGTS,BKSd->BKGTd", weights, value_BKSd, preferred_element_type=jnp.float32)
    return jnp.moveaxis(out_BKGTd, 3, 1).reshape(B, T, H, d).astype(query_BTHd.dtype)


def causal_attention(query_BTHd: jax.Array, key_BKTd: jax.Array, value_BKTd: jax.Array, mask_BTT: jax.Array) -> jax.Array:
    """`attention` among the tokens of one piece, in blocks of queries that leave out the keys behind them.

    Args:
      mask_BTT: as for `attention`; no query sees a later key.

    Returns:
      [B, T, H, d] in the query's dtype.
    """
    T = query_BTHd.shape[1]
    size = max(SHORTEST_BLOCK, -(-T // BLOCKS))
    blocks = [
        attention(query_BTHd[:, start:end], key_BKTd[:, :, :end], value_BKTd[:, :, :end], mask_BTT[:, start:end, :end])
        for start, end in ((start, min(start + size, T)) for start in range(0, T, size))
    ]
    return jnp.concatenate(blocks, axis=1)


def temperature_scale(positions: jax.Array, *, floor_scale: int, attn_scale: float) -> jax.Array:
    """Attention temperature of the layers without RoPE, a factor for their queries.

    Args:
      positions: [..., T] integer token positions, counted from 0. Integers on purpose: bfloat16 positions pick the wrong
        step for one position in six at a million tokens.
      floor_scale: tokens per step (8192 in the releases).
      attn_scale: growth of the scale per logarithmic step (0.1).

    Returns:
      [..., T] float32; exactly 1 below `floor_scale - 1`.

    Source: Llama 4 reference, `models/llama4/model.py`; spec section 2.2.
    """
    steps = (positions + 1) // floor_scale
    return 1.0 + attn_scale * jnp.log1p(steps.astype(jnp.float32))
