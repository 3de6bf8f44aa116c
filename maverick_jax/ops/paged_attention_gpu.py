"""Attention over pages on GPU: a Pallas-Triton kernel in which many programs share a row's slots, so that one row fills the card.

What the programs of a row find is merged by its highest scores. Slots that no query of a row sees are not read.

Shape suffixes: B rows, T query tokens, J stretches of a row (a page each), P slots of a page, K key/value heads, R queries per key/value
head (all tokens of its query heads), M the same, padded to what a tensor core takes, S slots of a block, d head size.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from maverick_jax.ops.attention import MASKED, Partial
from maverick_jax.ops.pages import Pages
from maverick_jax.ops.product import product
from maverick_jax.ops.triton import is_counted

DTYPES = ("bfloat16", "float16", "float32")
SLOTS = 64  # of a block
LEAST_SLOTS = 256  # of a part
PROGRAMS = 2048  # several for each place on a large GPU, since rows differ in length; more cost more to merge
MOST_PARTS = 256
LEAST = 16  # queries, slots or head size that a tensor core takes
MOST_QUERIES = 64
HEADS = (16, 32, 64, 128)


def suits(query_BTHd: jax.Array, pages: Pages) -> bool:
    """Whether a tensor core takes blocks of slots and heads, registers the queries, and offsets reach all pages."""
    (_, T, H, d), values = query_BTHd.shape, pages.key_NKPd
    S = min(pages.slots, SLOTS)
    whole = d in HEADS and S == pl.next_power_of_2(S) >= LEAST and pages.slots % S == 0
    return query_BTHd.dtype.name in DTYPES and whole and T * H // values.shape[1] <= MOST_QUERIES and is_counted(values)


# Under `jit` the kernel is traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("page", "interpret"))
def paged_attention_gpu(
    query_BTHd: jax.Array, pages: Pages, table_BJ: jax.Array, limit_BT: jax.Array, *, page: int, first: jax.Array, interpret: bool = False
) -> Partial:
    """As `over_pages`, where `suits` says yes. `interpret` runs it on any platform (for tests)."""
    B, T, H, d = query_BTHd.shape
    _, K, P, _ = pages.key_NKPd.shape
    R, J = T * H // K, table_BJ.shape[1]
    M = max(LEAST, pl.next_power_of_2(R))
    parts = max(1, min(PROGRAMS // (B * K * T), MOST_PARTS, pl.cdiv(J * P, LEAST_SLOTS)))
    limit_BT = limit_BT - first  # counted from the first slot that lies here
    last_B = limit_BT.max(axis=1)
    slots_B = jnp.where(last_B < 0, 0, jnp.minimum(last_B // page * P + jnp.minimum(last_B % page, P - 1) + 1, J * P))
    query_BKRd = query_BTHd.reshape(B, T, K, H // K, d).transpose(0, 2, 3, 1, 4).reshape(B, K, R, d)
    query_BKMd = jnp.pad(query_BKRd, ((0, 0), (0, 0), (0, M - R), (0, 0)))
    limit_BM = jnp.pad(jnp.tile(limit_BT, (1, H // K)), ((0, 0), (0, M - R)), constant_values=-1)
    stored = [x for x in pages if x is not None]
    sums = [(parts, B, K * R, d), (parts, B, K * R), (parts, B, K * R)]
    out, total, most = pl.pallas_call(
        functools.partial(_kernel, page=page, queries=R),
        grid=(parts, K, B),  # the first axis runs fastest
        in_specs=[
            pl.BlockSpec((None,), lambda _, __, b: (b,)),
            pl.BlockSpec((None, M), lambda _, __, b: (b, 0)),
            pl.BlockSpec((None, None, M, d), lambda _, k, b: (b, k, 0, 0)),
            *[pl.no_block_spec] * (1 + len(stored)),
        ],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(slots_B, limit_BM, query_BKMd, table_BJ, *stored)
    highest = most.max(axis=0)
    kept = jnp.exp(most - highest[None])
    out, total = (out * kept[..., None]).sum(axis=0), (total * kept).sum(axis=0)
    by_head = (B, K, H // K, T)
    return Partial(out.reshape(*by_head, d), total.reshape(by_head), highest.reshape(by_head))


def _kernel(slots_ref, limit_ref, query_ref, table_ref, key_ref, value_ref, *refs, page: int, queries: int):
    """One part of a row's slots, one key/value head."""
    *scale_refs, out_ref, total_ref, most_ref = refs
    part, parts, k, b = pl.program_id(0), pl.num_programs(0), pl.program_id(1), pl.program_id(2)
    (M, d), P = query_ref.shape, key_ref.shape[2]
    S = min(P, SLOTS)
    limit_M, query_Md = limit_ref[...], query_ref[...]
    blocks = pl.cdiv(slots_ref[...], S)
    size = jnp.maximum(LEAST_SLOTS // S, pl.cdiv(blocks, parts))

    def step(i, done):
        out_Md, total_M, most_M = done
        stretch, place = i // (P // S), i % (P // S) * S
        at = (plgpu.load(table_ref.at[b, stretch]), k, pl.ds(place, S))
        key_Sd, value_Sd = (plgpu.load(ref.at[*at, pl.ds(0, d)]).astype(query_Md.dtype) for ref in (key_ref, value_ref))
        scales = [plgpu.load(ref.at[*at])[None, :] for ref in scale_refs]
        score_MS = _dot(query_Md, key_Sd, (1, 1)) * d**-0.5
        if scales:
            score_MS *= scales[0]
        slot_S = stretch * page + place + jnp.arange(S, dtype=jnp.int32)
        seen_MS = slot_S[None, :] <= limit_M[:, None]
        seen_S = slot_S <= limit_M.max()
        value_Sd = jnp.where(seen_S[:, None], value_Sd, 0)  # of no weight, and others' NaN times that is NaN
        score_MS = jnp.where(seen_MS, score_MS, MASKED)
        higher_M = jnp.maximum(most_M, score_MS.max(axis=1))
        weight_MS = jnp.where(seen_MS, jnp.exp(score_MS - higher_M[:, None]), 0)
        kept_M = jnp.exp(most_M - higher_M)
        total_M = total_M * kept_M + weight_MS.sum(axis=1)
        if scales:
            weight_MS *= jnp.where(seen_S[None, :], scales[1], 0)
        return out_Md * kept_M[:, None] + _dot(weight_MS.astype(query_Md.dtype), value_Sd, (1, 0)), total_M, higher_M

    nothing = jnp.zeros((M, d), jnp.float32), jnp.zeros(M, jnp.float32), jnp.full(M, MASKED, jnp.float32)
    out_Md, total_M, most_M = lax.fori_loop(part * size, jnp.minimum((part + 1) * size, blocks), step, nothing)
    wanted_M, at = jnp.arange(M) < queries, (part, b, pl.ds(k * queries, M))
    plgpu.store(out_ref.at[*at], out_Md, mask=jnp.broadcast_to(wanted_M[:, None], (M, d)))
    plgpu.store(total_ref.at[*at], total_M, mask=wanted_M)
    plgpu.store(most_ref.at[*at], most_M, mask=wanted_M)


def _dot(a, b, axes: tuple[int, int]):
    return product(a, b, ((axes[0],), (axes[1],)))
