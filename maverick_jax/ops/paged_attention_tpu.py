"""Attention over pages on TPU: a Pallas kernel that fetches the pages that hold something seen, and no others.

A step of the kernel looks at a block of pages for one share of a row's queries, while those of the next step, of whatever share, are on
their way. There are as many steps as the shares need together: none waits for the longest. A few tokens of a row are one share with
all its heads; of many, a share has some queries of one key/value head, so many that they cost more time than the pages that they read.

Shape suffixes: B rows, T query tokens, J stretches of a row (a page each), W steps, K key/value heads, k of them in a share, R queries
per key/value head (all tokens of its query heads), Q of them in a share, M at once, A pages of a block, P slots of a page, S slots of
a block, d head size.
"""

import functools
from typing import NamedTuple

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
FEW_QUERIES = 64  # per key/value head, up to which a share has all heads
MOST_QUERIES, QUERIES_AT_ONCE = 1024, 256  # of a share: with their sums, and with their scores, in the 16 MiB of a v4
VMEM_BYTES = 64 * 2**20
SCALAR_BYTES = 2**20 - 2**16  # of the memory for scalars, where the table and the list of steps lie
DTYPES = ("bfloat16", "float32")


def suits(query_BTHd: jax.Array, pages: Pages, table_BJ: jax.Array) -> bool:
    """Whether pages fill whole registers, blocks of them fit the chip's memory and the table that for scalars."""
    d, P = query_BTHd.shape[3], pages.slots
    itemsize, shares = pages.key_NKPd.dtype.itemsize, _Shares.of(query_BTHd, pages, table_BJ)
    scalars = table_BJ.size + shares.total * (shares.most_steps + 2)
    fits = shares.heads * P * d * max(itemsize, 2) <= MOST_PAGE_BYTES and 4 * scalars <= SCALAR_BYTES
    return query_BTHd.dtype.name in DTYPES and d % LANES == 0 and P * itemsize % SUBLANE_BYTES == 0 and fits


# Under `jit` the kernel is traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("page", "interpret"))
def paged_attention_tpu(
    query_BTHd: jax.Array, pages: Pages, table_BJ: jax.Array, limit_BT: jax.Array, *, page: int, first: jax.Array, interpret: bool = False
) -> Partial:
    """As `over_pages`, where `suits` says yes. `interpret` runs it on any platform (for tests)."""
    B, T, H, d = query_BTHd.shape
    K, P, R = *pages.key_NKPd.shape[1:3], T * H // pages.key_NKPd.shape[1]
    shares = _Shares.of(query_BTHd, pages, table_BJ)
    k, Q = shares.heads, shares.queries
    missing = shares.of_queries * Q - R
    limit_BT = limit_BT - first  # counted from the first slot that lies here
    limit_BR = jnp.pad(jnp.tile(limit_BT, (1, H // K)), ((0, 0), (0, missing)), constant_values=-1)
    query_BKRd = query_BTHd.reshape(B, T, K, H // K, d).transpose(0, 2, 3, 1, 4).reshape(B, K, R, d)
    query_BKRd = jnp.pad(query_BKRd, ((0, 0), (0, 0), (0, missing), (0, 0)))
    last = limit_BR.reshape(B, 1, shares.of_queries, Q).max(axis=3)
    pages_of = jnp.broadcast_to(jnp.clip(last // page + 1, 0, shares.stretches), (B, shares.of_heads, shares.of_queries)).reshape(-1)
    steps_of = jnp.maximum(pl.cdiv(pages_of, shares.pages), 1)  # a share that sees nothing has its sums written, too
    behind = jnp.cumsum(steps_of, dtype=jnp.int32)
    share_W = jnp.searchsorted(behind, jnp.arange(shares.total * shares.most_steps, dtype=jnp.int32), side="right", method="compare_all")
    share_W = jnp.minimum(share_W, shares.total - 1).astype(jnp.int32)

    def of_share(k, last):
        """What a share has of [B, K, R, last], or, without heads, of [B, R, last]."""

        def index(w, share, *_):
            row, heads, queries = shares.place(share[w])
            return (row, heads, queries, 0) if k else (row, queries, 0)

        return pl.BlockSpec((None, k, Q, last) if k else (None, Q, last), index)

    stored = [x for x in pages if x is not None]
    buffers = [(2, k, shares.pages * P, d)] * 2 + [(2, shares.pages, k, P)] * (len(stored) - 2)
    sums = [d, 1, 1]
    out, total, most = pl.pallas_call(
        functools.partial(_kernel, shares=shares, page=page),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(behind[-1],),
            in_specs=[of_share(None, 1), of_share(k, d), *[pl.BlockSpec(memory_space=pl.ANY)] * len(stored)],
            out_specs=[of_share(k, last) for last in sums],
            scratch_shapes=[*(pltpu.VMEM(shape, x.dtype) for shape, x in zip(buffers, stored, strict=True)), pltpu.SemaphoreType.DMA((2,))],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, K, R + missing, last), jnp.float32) for last in sums],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
    )(share_W, behind - steps_of, pages_of, table_BJ.reshape(-1), limit_BR[:, :, None], query_BKRd, *stored)
    by_head = (B, K, H // K, T)
    return Partial(out[:, :, :R].reshape(*by_head, d), total[:, :, :R].reshape(by_head), most[:, :, :R].reshape(by_head))


class _Shares(NamedTuple):
    """How the work is divided.

    Attributes:
      total: shares of all rows.
      of_heads, of_queries: among how many the heads of a row, and the queries of a head, are divided.
      heads, queries: of a share; `queries` of each head.
      pages: of a step.
      most_steps: of a share.
      stretches: of a row.
    """

    total: int
    of_heads: int
    of_queries: int
    heads: int
    queries: int
    pages: int
    most_steps: int
    stretches: int

    @classmethod
    def of(cls, query_BTHd: jax.Array, pages: Pages, table_BJ: jax.Array) -> "_Shares":
        (B, T, H, d), K, J = query_BTHd.shape, pages.key_NKPd.shape[1], table_BJ.shape[1]
        R = T * H // K
        few = R <= FEW_QUERIES
        heads, queries = (K, R) if few else (1, min(MOST_QUERIES, -(-R // QUERIES_AT_ONCE) * QUERIES_AT_ONCE))
        key_bytes = heads * pages.slots * d * pages.key_NKPd.dtype.itemsize
        at_once = max(1, min(J, MOST_SLOTS // pages.slots, BLOCK_BYTES // key_bytes))
        of_heads, of_queries = K // heads, pl.cdiv(R, queries)
        return cls(B * of_heads * of_queries, of_heads, of_queries, heads, queries, at_once, pl.cdiv(J, at_once), J)

    def place(self, share: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Its row, and which heads and queries of it, counted in shares."""
        of_row = self.of_heads * self.of_queries
        within = lax.rem(share, of_row)
        return lax.div(share, of_row), lax.div(within, self.of_queries), lax.rem(within, self.of_queries)


def _kernel(share_ref, begin_ref, pages_ref, table_ref, limit_ref, query_ref, *refs, shares: _Shares, page: int):
    """One block of pages for one share; its sums stay in the chip's memory until its last."""
    stored_refs, (out_ref, total_ref, most_ref), buffers, arrived = _split(refs)
    w, steps, at_once, k = pl.program_id(0), pl.num_programs(0), shares.pages, shares.heads
    block = w - begin_ref[share_ref[w]]
    P = stored_refs[0].shape[2]

    def each_page(step, act):
        """Starts the transfers of a step's pages, or waits for them."""
        share = share_ref[step]
        row, heads, _ = shares.place(share)
        first = (step - begin_ref[share]) * at_once
        half = step % 2

        def of_page(i, _):
            at = table_ref[row * shares.stretches + first + i]
            slots = pl.ds(pl.multiple_of(i * P, P), P)
            for n, (source, buffer) in enumerate(zip(stored_refs, buffers, strict=True)):
                target = buffer.at[half, :, slots] if n < 2 else buffer.at[half, i]
                act(pltpu.make_async_copy(source.at[at, pl.ds(heads * k, k)], target, arrived.at[half]))
            return 0

        lax.fori_loop(0, jnp.minimum(pages_ref[share] - first, at_once), of_page, 0)

    @pl.when(w == 0)
    def begin():
        each_page(0, lambda copy: copy.start())

    @pl.when(w + 1 < steps)
    def fetch_next():
        each_page(w + 1, lambda copy: copy.start())

    @pl.when(block == 0)
    def begin_share():
        out_ref[...] = jnp.zeros_like(out_ref)
        total_ref[...] = jnp.zeros_like(total_ref)
        most_ref[...] = jnp.full_like(most_ref, MASKED)

    each_page(w, lambda copy: copy.wait())
    key_kSd, value_kSd, *scales_AkP = (buffer[w % 2] for buffer in buffers)
    scales_k1S = [jnp.concatenate([x[i] for i in range(at_once)], axis=1)[:, None] for x in scales_AkP]
    dtype, d, S = query_ref.dtype, query_ref.shape[2], key_kSd.shape[1]
    start, last = block * (at_once * page), limit_ref[...].max()
    slot_1S, slot_S1 = (start + _slots(shape, axis, P, page) for shape, axis in (((1, S), 1), ((S, 1), 0)))
    key_kSd = key_kSd.astype(dtype)
    # What no query sees has no weight, and NaN times that is NaN, be it others' or what lies where nothing was fetched.
    value_kSd = jnp.where((slot_S1 <= last)[None], value_kSd.astype(dtype), 0)

    def add(at):
        """Some of the share's queries."""
        seen_MS = slot_1S <= limit_ref[at, :]
        score_kMS = _dot(query_ref[:, at], key_kSd, 2) * d**-0.5
        if scales_k1S:
            score_kMS *= scales_k1S[0]
        score_kMS = jnp.where(seen_MS[None], score_kMS, MASKED)
        most_kM1 = jnp.maximum(most_ref[:, at], score_kMS.max(axis=2, keepdims=True))
        weight_kMS = jnp.where(seen_MS[None], jnp.exp(score_kMS - most_kM1), 0)
        kept_kM1 = jnp.exp(most_ref[:, at] - most_kM1)
        most_ref[:, at] = most_kM1
        total_ref[:, at] = total_ref[:, at] * kept_kM1 + weight_kMS.sum(axis=2, keepdims=True)
        if scales_k1S:
            weight_kMS *= jnp.where(slot_1S <= last, scales_k1S[1], 0)
        out_ref[:, at] = out_ref[:, at] * kept_kM1 + _dot(weight_kMS.astype(dtype), value_kSd, 1)

    if shares.queries <= FEW_QUERIES:
        add(slice(None))
    else:
        pl.loop(0, shares.queries // QUERIES_AT_ONCE)(lambda i: add(pl.ds(i * QUERIES_AT_ONCE, QUERIES_AT_ONCE)))


def _slots(shape, axis, P, page):
    """The slots of a block, counted in whole pages of which some lie here."""
    slot = lax.broadcasted_iota(jnp.int32, shape, axis)
    return slot if page == P else slot + lax.div(slot, P) * (page - P)


def _split(refs):
    """Pages, sums, buffers and their semaphores, of which there are as many as is stored."""
    stored = (len(refs) - 4) // 2
    return refs[:stored], refs[stored : stored + 3], refs[stored + 3 : -1], refs[-1]


def _dot(a, b, contract: int):
    """[k, M, S]: a product per head."""
    return product(a, b, ((2,), (contract,)), ((0,), (0,)))
