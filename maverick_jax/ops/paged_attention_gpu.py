"""Attention over pages on GPU: a Pallas-Triton kernel in which one program takes a tile of a row's queries, and a part of its slots.

Few queries leave most of a card without work: many programs share a row's slots, and a second kernel merges what they find. Slots that no
query of a tile sees are not read.

Shape suffixes: B rows, T query tokens, J stretches of a row (a page each), P slots of a page, K key/value heads, R queries per key/value
head (all tokens of its query heads), M queries of a tile, S slots of a block, d head size.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from maverick_jax.ops.attention import MASKED, Partial
from maverick_jax.ops.pages import Pages
from maverick_jax.ops.triton import dot, inside, is_counted, load, store

DTYPES = ("bfloat16", "float16", "float32")
SLOTS = 64  # of a block
LEAST_SLOTS = 256  # of a part
PROGRAMS = 2048  # several for each place on a large GPU, since rows differ in length; more cost more to merge
ENOUGH = 256  # programs, where there are so many queries that to merge costs more than places without work
MOST_PARTS = 256
LEAST = 16  # queries, slots or head size that a tensor core takes
HEADS = (16, 32, 64, 128)
LOG2_E = math.log2(math.e)


def suits(query_BTHd: jax.Array, pages: Pages) -> bool:
    """Whether a tensor core takes blocks of slots and heads, and offsets reach all pages."""
    d, values = query_BTHd.shape[3], pages.key_NKPd
    S = min(pages.slots, SLOTS)
    whole = d in HEADS and S == pl.next_power_of_2(S) >= LEAST and pages.slots % S == 0
    return query_BTHd.dtype.name in DTYPES and whole and is_counted(values)


# Under `jit` the kernel is traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("page", "dtype", "interpret"))
def paged_attention_gpu(
    query_BTHd: jax.Array,
    pages: Pages,
    table_BJ: jax.Array,
    limit_BT: jax.Array,
    *,
    page: int,
    first: jax.Array,
    dtype: DTypeLike = jnp.float32,
    interpret: bool = False,
) -> Partial:
    """As `over_pages`, where `suits` says yes.

    Args:
      dtype: of the values: float32, unless nothing is to be merged with them. They are divided by their weights.
      interpret: run the kernels as ordinary JAX operations, on any platform (for tests).
    """
    B, T, H, d = query_BTHd.shape
    K, P = pages.key_NKPd.shape[1:3]
    R, J = T * H // K, table_BJ.shape[1]
    M = min(_most_queries(query_BTHd.dtype), max(LEAST, pl.next_power_of_2(R)))
    tiles, missing = pl.cdiv(R, M), -R % M
    wanted = max(PROGRAMS // (B * K * T), ENOUGH // (B * K * tiles), 1)
    parts = pl.next_power_of_2(min(wanted, MOST_PARTS, pl.cdiv(J * P, LEAST_SLOTS)) + 1) // 2
    limit_BT = limit_BT - first  # counted from the first slot that lies here
    seen_BT = jnp.where(limit_BT < 0, 0, jnp.minimum(limit_BT // page * P + jnp.minimum(limit_BT % page, P - 1) + 1, J * P))
    seen_BR = jnp.pad(jnp.tile(seen_BT, (1, H // K)), ((0, 0), (0, missing)))
    query_BKRd = query_BTHd.reshape(B, T, K, H // K, d).transpose(0, 2, 3, 1, 4).reshape(B, K, R, d)
    stored = [x for x in pages if x is not None]
    means = [
        jax.ShapeDtypeStruct((B, K, R, parts, d), dtype if parts == 1 else jnp.float32),
        jax.ShapeDtypeStruct((B, K, R, parts), jnp.float32),
    ]
    out, weight = pl.pallas_call(
        functools.partial(_kernel, parts=parts, M=M),
        grid=(parts * tiles, K, B),  # the first axis runs fastest
        in_specs=[
            pl.BlockSpec((None, M), lambda i, _, b: (b, i // parts)),
            pl.BlockSpec((None, None, R, d), lambda i, k, b: (b, k, 0, 0)),
            *[pl.no_block_spec] * (1 + len(stored)),
        ],
        out_shape=means,
        compiler_params=plgpu.CompilerParams(num_warps=8 if M > 64 else 4, num_stages=3),
        interpret=interpret,
    )(seen_BR, query_BKRd, table_BJ, *stored)
    if parts > 1:
        out, weight = _merged(out.reshape(-1, parts, d), weight.reshape(-1, parts), dtype, interpret)
    by_head = (B, K, H // K, T)
    return Partial(out.reshape(*by_head, d), jnp.ones(by_head, jnp.float32), weight.reshape(by_head))


def _most_queries(dtype: DTypeLike) -> int:
    """Of a tile: what registers hold."""
    return 64 if dtype == jnp.float32 else 128


def _kernel(seen_ref, query_ref, table_ref, key_ref, value_ref, *refs, parts: int, M: int):
    """One part of the slots that a tile of queries sees, one key/value head: the mean value, and the logarithm of the sum of weights."""
    *scale_refs, out_ref, weight_ref = refs
    tile, part, k, b = pl.program_id(0) // parts, pl.program_id(0) % parts, pl.program_id(1), pl.program_id(2)
    (R, d), P = query_ref.shape, key_ref.shape[2]
    S, at_M = min(P, SLOTS), pl.ds(tile * M, M)
    asked_M = inside(tile * M, M, R)
    seen_M, query_Md = seen_ref[...], load(query_ref.at[at_M, pl.ds(0, d)], asked_M)
    blocks = pl.cdiv(seen_M.max(), S)
    size = jnp.maximum(LEAST_SLOTS // S, pl.cdiv(blocks, parts))

    def step(i, done, *, masked: bool):
        out_Md, total_M, most_M = done
        at = (plgpu.load(table_ref.at[b, i // (P // S)]), k, pl.ds(i % (P // S) * S, S))
        key_Sd, value_Sd = (plgpu.load(ref.at[*at, pl.ds(0, d)]).astype(query_Md.dtype) for ref in (key_ref, value_ref))
        scales = [plgpu.load(ref.at[*at])[None, :] for ref in scale_refs]
        slot_S = i * S + jnp.arange(S, dtype=jnp.int32)
        seen_MS = slot_S[None, :] < seen_M[:, None]
        seen_S = slot_S < seen_M.max()  # what no query sees has no weight, and others' NaN times that is NaN
        score_MS = dot(query_Md, key_Sd, (1, 1)) * (d**-0.5 * LOG2_E)
        if scales:
            score_MS *= scales[0]
        if masked:
            score_MS = jnp.where(seen_MS, score_MS, MASKED * LOG2_E)
            value_Sd = jnp.where(seen_S[:, None], value_Sd, 0)
        higher_M = jnp.maximum(most_M, score_MS.max(axis=1))
        weight_MS = jnp.exp2(score_MS - higher_M[:, None])
        if masked:
            weight_MS = jnp.where(seen_MS, weight_MS, 0)
        kept_M = jnp.exp2(most_M - higher_M)
        total_M = total_M * kept_M + weight_MS.sum(axis=1)
        if scales:
            weight_MS *= jnp.where(seen_S[None, :], scales[1], 0)
        return out_Md * kept_M[:, None] + dot(weight_MS.astype(query_Md.dtype), value_Sd), total_M, higher_M

    first, last = part * size, jnp.minimum((part + 1) * size, blocks)
    by_all = jnp.clip(seen_M.min() // S, first, jnp.maximum(first, last))  # until here every query sees every slot
    nothing = jnp.zeros((M, d), jnp.float32), jnp.zeros(M, jnp.float32), jnp.full(M, MASKED * LOG2_E, jnp.float32)
    done = lax.fori_loop(first, by_all, functools.partial(step, masked=False), nothing)
    out_Md, total_M, most_M = lax.fori_loop(by_all, last, functools.partial(step, masked=True), done)
    mean_Md = out_Md / jnp.where(total_M == 0, 1, total_M)[:, None]
    weight_M = jnp.where(total_M == 0, MASKED, (most_M + jnp.log2(total_M)) / LOG2_E)
    store(out_ref.at[b, k, at_M, part, pl.ds(0, d)], mean_Md, asked_M)
    store(weight_ref.at[b, k, at_M, part], weight_M, asked_M)


def _merged(mean_RPd, weight_RP, dtype, interpret):
    """[R, d] and [R]: what the parts found together, one row of them after the other."""
    rows, parts, d = mean_RPd.shape

    def kernel(mean_ref, weight_ref, out_ref, total_ref):
        weight_P = weight_ref[...]
        highest = weight_P.max()
        share_P = jnp.exp(weight_P - highest)
        total = share_P.sum()
        out_ref[...] = ((mean_ref[...] * share_P[:, None]).sum(axis=0) / total).astype(dtype)
        total_ref[...] = highest + jnp.log(total)

    def of_row(*shape):
        return pl.BlockSpec((None, *shape), lambda r: (r, *[0] * len(shape)))

    return pl.pallas_call(
        kernel,
        grid=(rows,),
        in_specs=[of_row(parts, d), of_row(parts)],
        out_specs=[of_row(d), of_row()],
        out_shape=[jax.ShapeDtypeStruct((rows, d), dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(mean_RPd, weight_RP)
