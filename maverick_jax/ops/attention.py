"""Grouped-query attention with causal and chunk masks made from positions, and Llama 4's attention temperature.

Shape suffixes: B batch, T query tokens, S key slots, H query heads, K key/value heads, G query heads per key/value
head, d head size.
"""

import contextlib

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30  # finite, so that a padding query which sees no key stays finite too
BLOCKS = 8  # of queries: seven sixteenths of the scores are never made
SHORTEST_BLOCK = 64
MOST_SCORES = 2**25  # held at once: 128 MiB
KEY_BLOCK = 1024
LONG = 1024  # tokens from which an accelerator's own kernel is worth it
CUDNN_DTYPES = ("bfloat16", "float16")
QUERY_BLOCKS = (16, 512)  # shortest and longest


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


def partial_attention(query_BTHd: jax.Array, key_BKSd: jax.Array, value_BKSd: jax.Array, mask_BTS: jax.Array) -> tuple[jax.Array, ...]:
    """Over some of the keys: what is needed to add up the attention over all (flash decoding).

    Returns:
      [B, K, G, T, d] float32 sum of values by `exp(score - most)`, [B, K, G, T] float32 sum of these weights, and `most`,
      [B, K, G, T] the highest score.
    """
    B, T, _, d = query_BTHd.shape
    query = query_BTHd.reshape(B, T, key_BKSd.shape[1], -1, d)
    scores = jnp.einsum("BTKGd,BKSd->BKGTS", query, key_BKSd, preferred_element_type=jnp.float32) * d**-0.5
    scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    most = scores.max(axis=-1)
    weights = jnp.exp(scores - most[..., None])
    out = jnp.einsum("BKGTS,BKSd->BKGTd", weights.astype(value_BKSd.dtype), value_BKSd, preferred_element_type=jnp.float32)
    return out, weights.sum(axis=-1), most


def attend(
    query_BTHd: jax.Array,
    key_BKSd: jax.Array,
    value_BKSd: jax.Array,
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    chunk: int | None,
) -> jax.Array:
    """Queries over any keys, told apart by their positions (see `visible`): a piece over a cache, one token of a decode.

    Many scores are made in blocks: no more than `MOST_SCORES` are held.

    Returns:
      [B, T, H, d] in the query's dtype.
    """
    B, T, H, _ = query_BTHd.shape
    if T == 1 or B * H * T * key_BKSd.shape[2] <= MOST_SCORES:
        return attention(query_BTHd, key_BKSd, value_BKSd, visible(query_positions_BT, key_positions_BS, chunk))
    return _blockwise(query_BTHd, key_BKSd, value_BKSd, query_positions_BT, key_positions_BS, chunk)


def attend_in_order(query_BTHd: jax.Array, key_BKTd: jax.Array, value_BKTd: jax.Array, chunk: int | None) -> jax.Array:
    """Among the tokens at positions 0 to T - 1: as `attend`, but what is masked everywhere is never computed.

    Several chunks are that many independent rows.

    Returns:
      [B, T, H, d] in the query's dtype.
    """
    B, T, H, d = query_BTHd.shape
    if chunk is not None and chunk < T:
        missing = -T % chunk
        query = jnp.pad(query_BTHd, ((0, 0), (0, missing), (0, 0), (0, 0))).reshape(-1, chunk, H, d)
        key, value = (_chunk_rows(x, chunk, missing) for x in (key_BKTd, value_BKTd))
        out = attend_in_order(query, key, value, None)
        return out.reshape(B, T + missing, H, d)[:, :T]
    if T < LONG:
        return _causal(query_BTHd, key_BKTd, value_BKTd)
    return lax.platform_dependent(query_BTHd, key_BKTd, value_BKTd, tpu=_causal_tpu, cuda=_causal_cuda, default=_causal)


def _causal_tpu(query_BTHd, key_BKTd, value_BKTd):
    # Importing Pallas takes a while, and short prompts do without.
    from maverick_jax.ops.attention_tpu import causal_attention_tpu, suits

    form = causal_attention_tpu if suits(query_BTHd.shape[1], query_BTHd.shape[3]) else _causal
    return form(query_BTHd, key_BKTd, value_BKTd)


def _causal_cuda(query_BTHd, key_BKTd, value_BKTd):
    if query_BTHd.dtype.name in CUDNN_DTYPES:
        key, value = key_BKTd.swapaxes(1, 2), value_BKTd.swapaxes(1, 2)
        # Every platform's form is traced on all: where there is no cuDNN no GPU will run this one.
        with contextlib.suppress(RuntimeError):
            return jax.nn.dot_product_attention(query_BTHd, key, value, is_causal=True, implementation="cudnn")
    return _causal(query_BTHd, key_BKTd, value_BKTd)


def _causal(query_BTHd, key_BKTd, value_BKTd):
    B, T, H, _ = query_BTHd.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if B * H * T * T > MOST_SCORES:
        return _blockwise(query_BTHd, key_BKTd, value_BKTd, positions_BT, positions_BT, None)
    size = max(SHORTEST_BLOCK, -(-T // BLOCKS))
    blocks = [
        attend(
            query_BTHd[:, start:end], key_BKTd[:, :, :end], value_BKTd[:, :, :end], positions_BT[:, start:end], positions_BT[:, :end], None
        )
        for start, end in ((start, min(start + size, T)) for start in range(0, T, size))
    ]
    return jnp.concatenate(blocks, axis=1)


def _chunk_rows(x_BKTd, chunk, missing):
    """[B, K, T, d] -> [B * chunks, K, chunk, d]."""
    B, K, T, d = x_BKTd.shape
    cut = jnp.pad(x_BKTd, ((0, 0), (0, 0), (0, missing), (0, 0))).reshape(B, K, (T + missing) // chunk, chunk, d)
    return cut.swapaxes(1, 2).reshape(-1, K, chunk, d)


def _blockwise(query_BTHd, key_BKSd, value_BKSd, query_positions_BT, key_positions_BS, chunk):
    """Softmax over blocks of keys as they come, one block of queries after the other: T x S scores are never in memory.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Rabe and Staats, "Self-attention
    does not need O(n^2) memory" (2021).
    """
    B, T, H, d = query_BTHd.shape
    K, S = key_BKSd.shape[1:3]
    least, most = QUERY_BLOCKS
    size = max(least, min(most, 1 << (MOST_SCORES // (B * H * KEY_BLOCK)).bit_length() >> 1))
    missing, missing_keys = -T % size, -S % KEY_BLOCK
    query = jnp.pad(query_BTHd, ((0, 0), (0, missing), (0, 0), (0, 0))).reshape(B, -1, size, H, d)
    positions = jnp.pad(query_positions_BT, ((0, 0), (0, missing)), constant_values=-1).reshape(B, -1, size)
    key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, missing_keys), (0, 0))) for x in (key_BKSd, value_BKSd))
    key_positions = jnp.pad(key_positions_BS, ((0, 0), (0, missing_keys)), constant_values=-1)

    @jax.checkpoint  # the gradient makes a block of queries' scores again, instead of keeping those of all
    def per_queries(block):
        query_BQHd, positions_BQ = block

        def per_keys(carry, j):
            start = j * KEY_BLOCK
            seen_BQS = visible(positions_BQ, lax.dynamic_slice_in_dim(key_positions, start, KEY_BLOCK, axis=1), chunk)
            return lax.cond(seen_BQS.any(), add, lambda carry, *_: carry, carry, start, seen_BQS), None

        def add(carry, start, seen_BQS):
            out, total, most = carry
            k, v = (lax.dynamic_slice_in_dim(x, start, KEY_BLOCK, axis=2) for x in (key, value))
            new_out, new_total, new_most = partial_attention(query_BQHd, k, v, seen_BQS)
            highest = jnp.maximum(most, new_most)
            old, new = jnp.exp(most - highest), jnp.exp(new_most - highest)
            return out * old[..., None] + new_out * new[..., None], total * old + new_total * new, highest

        empty = jnp.zeros((B, K, H // K, size), jnp.float32)
        start = (jnp.zeros((*empty.shape, d), jnp.float32), empty, empty + MASKED)
        (out, total, _), _ = lax.scan(per_keys, start, jnp.arange((S + missing_keys) // KEY_BLOCK))
        return (out / jnp.maximum(total, 1e-30)[..., None]).astype(query_BTHd.dtype)

    out = lax.map(per_queries, (jnp.moveaxis(query, 1, 0), jnp.moveaxis(positions, 1, 0)))  # [blocks, B, K, G, size, d]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, T + missing, H, d)[:, :T]


def write_slots(buffer_BKSd: jax.Array, new_BKTd: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """New keys or values into the slots of a buffer; slot S, one past the last, is nowhere."""
    rows = jnp.arange(buffer_BKSd.shape[0])[:, None]
    return buffer_BKSd.at[rows, :, slots_BT].set(new_BKTd.swapaxes(1, 2).astype(buffer_BKSd.dtype), mode="drop")


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
