"""Attention over pages on TPU: a Pallas kernel that fetches the pages that hold something seen, and no others.

A step of the kernel looks at a block of pages of one row, while those of the next step, of whatever row, are on their way. There
are as many steps as the rows need together: none waits for the longest.

Shape suffixes: B rows, T query tokens, J stretches of a row (a page each), W steps, K key/value heads, R queries per key/value head
(all tokens of its query heads), A pages of a block, P slots of a page, S slots of a block, d head size.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maverick_jax.ops.attention import MASKED, Partial
from maverick_jax.ops.pages import Pages
from maverick_jax.ops.product import product

LANES, SUBLANE_BYTES = 128, 32  # of a register; rows of narrow dtypes share a sublane
MOST_SLOTS = 2048  # of a block
BLOCK_BYTES = 2**20  # of its keys: a transfer that takes longer than a step's fixed cost
MOST_PAGE_BYTES = 2 * 2**20  # of its keys, counted as bfloat16 at least: what two blocks need fits 16 MiB, all that a v4 has
MOST_QUERIES = 64
VMEM_BYTES = 64 * 2**20
SCALAR_BYTES = 2**20 - 2**16  # of the memory for scalars, where the table and the list of steps lie
DTYPES = ("bfloat16", "float32")


def suits(query_BTHd: jax.Array, pages: Pages, table_BJ: jax.Array) -> bool:
    """Whether pages fill whole registers, blocks of them fit the chip's memory and the table that for scalars."""
    (B, T, H, d), (_, K, P, _) = query_BTHd.shape, pages.key_NKPd.shape
    itemsize = pages.key_NKPd.dtype.itemsize
    scalars = table_BJ.size + _most_steps(pages, table_BJ) + 2 * B
    fits = T * H // K <= MOST_QUERIES and K * P * d * max(itemsize, 2) <= MOST_PAGE_BYTES and 4 * scalars <= SCALAR_BYTES
    return query_BTHd.dtype.name in DTYPES and d % LANES == 0 and P * itemsize % SUBLANE_BYTES == 0 and fits


# Under `jit` the kernel is traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("page", "interpret"))
def paged_attention_tpu(
    query_BTHd: jax.Array, pages: Pages, table_BJ: jax.Array, limit_BT: jax.Array, *, page: int, first: jax.Array, interpret: bool = False
) -> Partial:
    """As `over_pages`, where `suits` says yes. `interpret` runs it on any platform (for tests)."""
    B, T, H, d = query_BTHd.shape
    K, P, R = *pages.key_NKPd.shape[1:3], T * H // pages.key_NKPd.shape[1]
    at_once = _pages_at_once(pages, table_BJ)
    limit_BT = limit_BT - first  # counted from the first slot that lies here
    pages_B = jnp.clip(limit_BT.max(axis=1) // page + 1, 0, table_BJ.shape[1])
    steps_B = jnp.maximum(pl.cdiv(pages_B, at_once), 1)  # a row that sees nothing has its sums written, too
    behind_B = jnp.cumsum(steps_B, dtype=jnp.int32)
    step_W = jnp.arange(_most_steps(pages, table_BJ), dtype=jnp.int32)
    row_W = (step_W[:, None] >= behind_B[None, :-1]).sum(axis=1, dtype=jnp.int32)
    query_BKRd = query_BTHd.reshape(B, T, K, H // K, d).transpose(0, 2, 3, 1, 4).reshape(B, K, R, d)
    limit_BR1 = jnp.tile(limit_BT, (1, H // K))[:, :, None]

    def of_row(*shape):
        return pl.BlockSpec((None, *shape), lambda w, row, *_: (row[w], *[0] * len(shape)))

    stored = [x for x in pages if x is not None]
    buffers = [(2, K, at_once * P, d)] * 2 + [(2, at_once, K, P)] * (len(stored) - 2)
    sums = [(K, R, d), (K, R, 1), (K, R, 1)]
    out, total, most = pl.pallas_call(
        functools.partial(_kernel, at_once=at_once, page=page),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(behind_B[-1],),
            in_specs=[of_row(R, 1), of_row(K, R, d), *[pl.BlockSpec(memory_space=pl.ANY)] * len(stored)],
            out_specs=[of_row(*shape) for shape in sums],
            scratch_shapes=[*(pltpu.VMEM(shape, x.dtype) for shape, x in zip(buffers, stored, strict=True)), pltpu.SemaphoreType.DMA((2,))],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, *shape), jnp.float32) for shape in sums],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
    )(row_W, behind_B - steps_B, pages_B, table_BJ.reshape(-1), limit_BR1, query_BKRd, *stored)
    by_head = (B, K, H // K, T)
    return Partial(out.reshape(*by_head, d), total.reshape(by_head), most.reshape(by_head))


def _pages_at_once(pages, table_BJ):
    key_bytes = math.prod(pages.key_NKPd.shape[1:]) * pages.key_NKPd.dtype.itemsize
    return max(1, min(table_BJ.shape[1], MOST_SLOTS // pages.slots, BLOCK_BYTES // key_bytes))


def _most_steps(pages, table_BJ):
    return table_BJ.shape[0] * pl.cdiv(table_BJ.shape[1], _pages_at_once(pages, table_BJ))


def _kernel(row_ref, begin_ref, pages_ref, table_ref, limit_ref, query_ref, *refs, at_once: int, page: int):
    """One block of pages of one row; the row's sums stay in the chip's memory until its last."""
    stored_refs, (out_ref, total_ref, most_ref), buffers, arrived = _split(refs)
    w, steps = pl.program_id(0), pl.num_programs(0)
    block = w - begin_ref[row_ref[w]]
    P, J = stored_refs[0].shape[2], table_ref.shape[0] // begin_ref.shape[0]

    def each_page(step, act):
        """Starts the transfers of a step's pages, or waits for them."""
        row = row_ref[step]
        first = (step - begin_ref[row]) * at_once
        half = step % 2

        def of_page(i, _):
            at = table_ref[row * J + first + i]
            slots = pl.ds(pl.multiple_of(i * P, P), P)
            for n, (source, buffer) in enumerate(zip(stored_refs, buffers, strict=True)):
                target = buffer.at[half, :, slots] if n < 2 else buffer.at[half, i]
                act(pltpu.make_async_copy(source.at[at], target, arrived.at[half]))
            return 0

        lax.fori_loop(0, jnp.minimum(pages_ref[row] - first, at_once), of_page, 0)

    @pl.when(w == 0)
    def begin():
        for buffer in buffers:  # what is not fetched has no weight, and must be a number
            buffer[...] = jnp.zeros_like(buffer)
        each_page(0, lambda copy: copy.start())

    @pl.when(w + 1 < steps)
    def fetch_next():
        each_page(w + 1, lambda copy: copy.start())

    @pl.when(block == 0)
    def begin_row():
        out_ref[...] = jnp.zeros_like(out_ref)
        total_ref[...] = jnp.zeros_like(total_ref)
        most_ref[...] = jnp.full_like(most_ref, MASKED)

    each_page(w, lambda copy: copy.wait())
    key_KSd, value_KSd, *scales_AKP = (buffer[w % 2] for buffer in buffers)
    scales_K1S = [jnp.concatenate([x[i] for i in range(at_once)], axis=1)[:, None] for x in scales_AKP]
    query_KRd = query_ref[...]
    dtype, d, S = query_KRd.dtype, query_KRd.shape[2], key_KSd.shape[1]
    slot_1S = lax.broadcasted_iota(jnp.int32, (1, S), 1)
    if page != P:
        slot_1S += lax.div(slot_1S, P) * (page - P)
    slot_S1 = lax.broadcasted_iota(jnp.int32, (S, 1), 0)
    if page != P:
        slot_S1 += lax.div(slot_S1, P) * (page - P)
    start, last = block * (at_once * page), limit_ref[...].max()
    seen_RS = start + slot_1S <= limit_ref[...]
    score_KRS = _dot(query_KRd, key_KSd.astype(dtype), 2) * d**-0.5
    if scales_K1S:
        score_KRS *= scales_K1S[0]
    score_KRS = jnp.where(seen_RS[None], score_KRS, MASKED)
    most_KR1 = jnp.maximum(most_ref[...], score_KRS.max(axis=2, keepdims=True))
    weight_KRS = jnp.where(seen_RS[None], jnp.exp(score_KRS - most_KR1), 0)
    kept_KR1 = jnp.exp(most_ref[...] - most_KR1)
    most_ref[...] = most_KR1
    total_ref[...] = total_ref[...] * kept_KR1 + weight_KRS.sum(axis=2, keepdims=True)
    if scales_K1S:
        weight_KRS *= jnp.where(start + slot_1S <= last, scales_K1S[1], 0)
    # What no query sees has no weight, and others' NaN times that is NaN.
    value_KSd = jnp.where((start + slot_S1 <= last)[None], value_KSd.astype(dtype), 0)
    out_ref[...] = out_ref[...] * kept_KR1 + _dot(weight_KRS.astype(dtype), value_KSd, 1)


def _split(refs):
    """Pages, sums, buffers and their semaphores, of which there are as many as is stored."""
    stored = (len(refs) - 4) // 2
    return refs[:stored], refs[stored : stored + 3], refs[stored + 3 : -1], refs[-1]


def _dot(a, b, contract: int):
    """[K, R, S]: a product per head."""
    return product(a, b, ((2,), (contract,)), ((0,), (0,)))
