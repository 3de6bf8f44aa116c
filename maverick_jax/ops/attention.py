"""Grouped-query attention with causal and chunk masks made from positions, and Llama 4's attention temperature.

Shape suffixes: B batch, T query tokens, S key slots, H query heads, K key/value heads, G query heads per key/value
head, d head size.
"""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from maverick_jax.ops.product import einsum

MASKED = -1e30  # finite, so that a padding query which sees no key stays finite too
BLOCKS = 8  # of queries: seven sixteenths of the scores are never made
SHORTEST_BLOCK = 64
MOST_SCORES = 2**25  # held at once: 128 MiB
KEY_BLOCK = 1024
LONG = 1024  # tokens from which an accelerator's own kernel is worth it
CUDNN_DTYPES = ("bfloat16", "float16")
CUDNN_HEAD = 8  # divides the sizes of heads
LEAST_CUDNN = 256  # tokens that all see each other
QUERY_BLOCKS = (16, 512)  # shortest and longest


class Keys(NamedTuple):
    """Some of the keys that queries look at, with their values.

    Attributes:
      key_BKSd, value_BKSd: in the model's dtype.
      positions_BS: int32; negative marks an empty slot.
    """

    key_BKSd: jax.Array
    value_BKSd: jax.Array
    positions_BS: jax.Array


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
    scores_BKGTS = einsum("BTKGd,BKSd->BKGTS", query, key_BKSd) * d**-0.5
    if mask_BTS is not None:
        scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)
    weights = jax.nn.softmax(scores_BKGTS, axis=-1).astype(value_BKSd.dtype)
    # Asked for BTKGd at once, einsum swaps the operands, and XLA:CPU has no such bfloat16 product.
    out_BKGTd = einsum("BKGTS,BKSd->BKGTd", weights, value_BKSd)
    return jnp.moveaxis(out_BKGTd, 3, 1).reshape(B, T, H, d).astype(query_BTHd.dtype)


def attend_to_all(query_BTHd: jax.Array, key_BTHd: jax.Array, value_BTHd: jax.Array) -> jax.Array:
    """Every token sees every token (vision).

    Returns:
      [B, T, H, d] in the query's dtype.
    """
    return lax.platform_dependent(query_BTHd, key_BTHd, value_BTHd, cuda=_to_all_cuda, default=_to_all)


def _to_all(query_BTHd, key_BTHd, value_BTHd):
    return attention(query_BTHd, key_BTHd.swapaxes(1, 2), value_BTHd.swapaxes(1, 2), None)


def _to_all_cuda(query_BTHd, key_BTHd, value_BTHd):
    out = _cudnn(query_BTHd, key_BTHd, value_BTHd, is_causal=False) if query_BTHd.shape[1] >= LEAST_CUDNN else None
    return _to_all(query_BTHd, key_BTHd, value_BTHd) if out is None else out


class Partial(NamedTuple):
    """Attention over some of the keys, to be merged to that over all (flash decoding).

    Attributes:
      out_BKGTd: float32 sum of values by `exp(score - most)`; already in the model's dtype where it is the mean and all there is.
      total_BKGT: float32 sum of these weights.
      most_BKGT: the highest score.
    """

    out_BKGTd: jax.Array
    total_BKGT: jax.Array
    most_BKGT: jax.Array

    def merge(self, other: "Partial") -> "Partial":
        most = jnp.maximum(self.most_BKGT, other.most_BKGT)
        a, b = jnp.exp(self.most_BKGT - most), jnp.exp(other.most_BKGT - most)
        out = self.out_BKGTd * a[..., None] + other.out_BKGTd * b[..., None]
        return Partial(out, self.total_BKGT * a + other.total_BKGT * b, most)

    def finish(self, dtype: DTypeLike) -> jax.Array:
        """[B, T, H, d]."""
        B, _, _, T, d = self.out_BKGTd.shape
        out_BKGTd = self.out_BKGTd / jnp.maximum(self.total_BKGT, 1e-30).astype(self.out_BKGTd.dtype)[..., None]
        return jnp.moveaxis(out_BKGTd, 3, 1).reshape(B, T, -1, d).astype(dtype)


def partial_attention(query_BTHd: jax.Array, query_positions_BT: jax.Array, keys: Keys, chunk: int | None) -> Partial:
    """Over some of the keys, masked by positions (see `visible`); where a query sees none of them, `most` says so to `merge`.

    Many scores are made in blocks: no more than `MOST_SCORES` are held.
    """
    B, T, H, _ = query_BTHd.shape
    form = _partial if B * H * T * keys.positions_BS.shape[1] <= MOST_SCORES else _blockwise
    return form(query_BTHd, query_positions_BT, keys, chunk)


def _partial(query_BTHd, query_positions_BT, keys, chunk):
    B, T, _, d = query_BTHd.shape
    query = query_BTHd.reshape(B, T, keys.key_BKSd.shape[1], -1, d)
    scores = einsum("BTKGd,BKSd->BKGTS", query, keys.key_BKSd) * d**-0.5
    scores = jnp.where(visible(query_positions_BT, keys.positions_BS, chunk)[:, None, None], scores, MASKED)
    most = scores.max(axis=-1)
    weights = jnp.exp(scores - most[..., None])
    value_BKSd = keys.value_BKSd
    out = einsum("BKGTS,BKSd->BKGTd", weights.astype(value_BKSd.dtype), value_BKSd)
    return Partial(out, weights.sum(axis=-1), most)


def attend(query_BTHd: jax.Array, query_positions_BT: jax.Array, keys: Keys, chunk: int | None) -> jax.Array:
    """Queries over keys, told apart by their positions: as `partial_attention`, of all keys there are.

    Returns:
      [B, T, H, d] in the query's dtype.
    """
    B, T, H, _ = query_BTHd.shape
    if T > 1 and B * H * T * keys.positions_BS.shape[1] <= MOST_SCORES:
        return attention(query_BTHd, keys.key_BKSd, keys.value_BKSd, visible(query_positions_BT, keys.positions_BS, chunk))
    return partial_attention(query_BTHd, query_positions_BT, keys, chunk).finish(query_BTHd.dtype)


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


def attend_apart(query_BTHd: jax.Array, positions_BT: jax.Array, key_BKTd: jax.Array, value_BKTd: jax.Array, chunk: int) -> jax.Array:
    """Among the tokens of rows of several documents, whose positions lie so far apart that no chunk holds parts of two.

    Args:
      positions_BT: int32, ascending along each chunk; negative is padding.

    Returns:
      [B, T, H, d] in the query's dtype.
    """
    if query_BTHd.shape[1] < LONG:
        return _apart(query_BTHd, positions_BT, key_BKTd, value_BKTd, chunk)
    branches = {"tpu": functools.partial(_apart_tpu, chunk=chunk), "default": functools.partial(_apart, chunk=chunk)}
    return lax.platform_dependent(query_BTHd, positions_BT, key_BKTd, value_BKTd, **branches)


def _apart(query_BTHd, positions_BT, key_BKTd, value_BKTd, chunk):
    return partial_attention(query_BTHd, positions_BT, Keys(key_BKTd, value_BKTd, positions_BT), chunk).finish(query_BTHd.dtype)


def _apart_tpu(query_BTHd, positions_BT, key_BKTd, value_BKTd, chunk):
    from maverick_jax.ops.attention_tpu import causal_attention_tpu, suits

    if not suits(query_BTHd.shape[1], query_BTHd.shape[3], query_BTHd.dtype):
        return _apart(query_BTHd, positions_BT, key_BKTd, value_BKTd, chunk)
    return causal_attention_tpu(query_BTHd, key_BKTd, value_BKTd, positions_BT // chunk, longest=chunk)


def _causal_tpu(query_BTHd, key_BKTd, value_BKTd):
    # Importing Pallas takes a while, and short prompts do without.
    from maverick_jax.ops.attention_tpu import causal_attention_tpu, suits

    form = causal_attention_tpu if suits(query_BTHd.shape[1], query_BTHd.shape[3], query_BTHd.dtype) else _causal
    return form(query_BTHd, key_BKTd, value_BKTd)


def _causal_cuda(query_BTHd, key_BKTd, value_BKTd):
    out = _cudnn(query_BTHd, key_BKTd.swapaxes(1, 2), value_BKTd.swapaxes(1, 2), is_causal=True)
    return _causal(query_BTHd, key_BKTd, value_BKTd) if out is None else out


def _cudnn(query_BTHd, key_BTKd, value_BTKd, *, is_causal):
    """By cuDNN's flash attention; None where it takes no such operands, or is not there."""
    if query_BTHd.dtype.name not in CUDNN_DTYPES or query_BTHd.shape[3] % CUDNN_HEAD:
        return None
    # Every platform's form is traced on all: where there is no cuDNN no GPU will run this one.
    with contextlib.suppress(RuntimeError):
        return jax.nn.dot_product_attention(query_BTHd, key_BTKd, value_BTKd, is_causal=is_causal, implementation="cudnn")


def _causal(query_BTHd, key_BKTd, value_BKTd):
    B, T, H, _ = query_BTHd.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if B * H * T * T > MOST_SCORES:
        return attend(query_BTHd, positions_BT, Keys(key_BKTd, value_BKTd, positions_BT), None)
    size = max(SHORTEST_BLOCK, -(-T // BLOCKS))
    blocks = []
    for start, end in ((start, min(start + size, T)) for start in range(0, T, size)):
        earlier = Keys(key_BKTd[:, :, :end], value_BKTd[:, :, :end], positions_BT[:, :end])
        blocks.append(attend(query_BTHd[:, start:end], positions_BT[:, start:end], earlier, None))
    return jnp.concatenate(blocks, axis=1)


def _chunk_rows(x_BKTd, chunk, missing):
    """[B, K, T, d] -> [B * chunks, K, chunk, d]."""
    B, K, T, d = x_BKTd.shape
    cut = jnp.pad(x_BKTd, ((0, 0), (0, 0), (0, missing), (0, 0))).reshape(B, K, (T + missing) // chunk, chunk, d)
    return cut.swapaxes(1, 2).reshape(-1, K, chunk, d)


def _blockwise(query_BTHd, query_positions_BT, keys, chunk):
    """Softmax over blocks of keys as they come, one block of queries after the other: T x S scores are never in memory.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Rabe and Staats, "Self-attention
    does not need O(n^2) memory" (2021).
    """
    B, T, H, d = query_BTHd.shape
    K, S = keys.key_BKSd.shape[1:3]
    least, most = QUERY_BLOCKS
    size = max(least, min(most, 1 << (MOST_SCORES // (B * H * KEY_BLOCK)).bit_length() >> 1))
    missing, missing_keys = -T % size, -S % KEY_BLOCK
    query = jnp.pad(query_BTHd, ((0, 0), (0, missing), (0, 0), (0, 0))).reshape(B, -1, size, H, d)
    positions = jnp.pad(query_positions_BT, ((0, 0), (0, missing)), constant_values=-1).reshape(B, -1, size)
    key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, missing_keys), (0, 0))) for x in (keys.key_BKSd, keys.value_BKSd))
    padded = Keys(key, value, jnp.pad(keys.positions_BS, ((0, 0), (0, missing_keys)), constant_values=-1))

    # The gradient makes the scores of a block of queries, and of keys, again, instead of keeping those of all.
    @jax.checkpoint
    def per_queries(block):
        query_BQHd, positions_BQ = block

        def per_keys(done, j):
            block = functools.partial(lax.dynamic_slice_in_dim, start_index=j * KEY_BLOCK, slice_size=KEY_BLOCK)
            some = Keys(block(padded.key_BKSd, axis=2), block(padded.value_BKSd, axis=2), block(padded.positions_BS, axis=1))
            any_seen = visible(positions_BQ, some.positions_BS, chunk).any()
            return lax.cond(any_seen, lambda: done.merge(_partial(query_BQHd, positions_BQ, some, chunk)), lambda: done), None

        zeros = jnp.zeros((B, K, H // K, size), jnp.float32)
        nothing = Partial(jnp.zeros((*zeros.shape, d), jnp.float32), zeros, zeros + MASKED)
        done, _ = lax.scan(jax.checkpoint(per_keys), nothing, jnp.arange((S + missing_keys) // KEY_BLOCK))
        return done

    parts = lax.map(per_queries, (jnp.moveaxis(query, 1, 0), jnp.moveaxis(positions, 1, 0)))
    return Partial(*(of_query_blocks(x, T) for x in parts))


def of_query_blocks(x: jax.Array, T: int) -> jax.Array:
    """[blocks, B, K, G, size, ...] -> [B, K, G, T, ...]: sums of queries that were taken block by block."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :T]


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
