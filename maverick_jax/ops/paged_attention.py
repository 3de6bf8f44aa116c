"""Keys and values in pages: what attention reads of them, and how new tokens are written.

A row's cache is a sequence of slots that lie in pages, wherever a table says. A query sees a prefix of them: nothing here knows
of positions, chunks or other rows.

Shape suffixes: B rows, T tokens, J stretches of a row (a page each), N pages, P slots of a page, K key/value heads, H query
heads, G query heads per key/value head, d head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from maverick_jax.ops.attention import MASKED, MOST_SCORES, Keys, Partial, of_query_blocks
from maverick_jax.ops.pages import Pages, as_floats, as_held, quantize_keys
from maverick_jax.ops.product import einsum


def over_pages(query_BTHd: jax.Array, pages: Pages, table_BJ: jax.Array, limit_BT: jax.Array, *, page: int, first: jax.Array) -> Partial:
    """Attention over each row's pages, up to a slot that each query has for itself.

    Args:
      pages: all slots of every page, or on a mesh some: those from `first` on.
      table_BJ: int32, the page of every stretch of `page` slots of a row; what no query sees is not looked at.
      limit_BT: int32, the last slot of its row that a query sees; negative: none.
      page: slots of a whole page.
      first: [] int32.
    """
    return _by_platform(lambda found: found, jnp.float32, query_BTHd, pages, table_BJ, limit_BT, first, page=page)


def attend_pages(
    query_BTHd: jax.Array, pages: Pages, table_BJ: jax.Array, limit_BT: jax.Array, *, page: int, first: jax.Array
) -> jax.Array:
    """As `over_pages`, of all that there is: [B, T, H, d] in the query's dtype."""
    dtype = query_BTHd.dtype
    return _by_platform(lambda found: found.finish(dtype), dtype, query_BTHd, pages, table_BJ, limit_BT, first, page=page)


def _by_platform(finish: Callable[[Partial], Any], dtype, *arguments, page):
    """`dtype` of the values that a kernel may finish itself."""
    forms = {"tpu": _on_tpu, "cuda": functools.partial(_on_gpu, dtype=dtype), "default": _in_blocks}
    branches = {platform: lambda *arguments, form=form: finish(form(*arguments, page=page)) for platform, form in forms.items()}
    return lax.platform_dependent(*arguments, **branches)


# Importing Pallas takes a while, and much that imports this module never attends to anything.
def _on_tpu(query_BTHd, pages, table_BJ, limit_BT, first, *, page):
    from maverick_jax.ops.paged_attention_tpu import paged_attention_tpu, suits

    if not suits(query_BTHd, pages, table_BJ):
        return _in_blocks(query_BTHd, pages, table_BJ, limit_BT, first, page=page)
    return paged_attention_tpu(query_BTHd, pages, table_BJ, limit_BT, page=page, first=first)


def _on_gpu(query_BTHd, pages, table_BJ, limit_BT, first, *, page, dtype):
    from maverick_jax.ops.paged_attention_gpu import paged_attention_gpu, suits

    if not suits(query_BTHd, pages):
        return _in_blocks(query_BTHd, pages, table_BJ, limit_BT, first, page=page)
    return paged_attention_gpu(query_BTHd, pages, table_BJ, limit_BT, page=page, first=first, dtype=dtype)


def _in_blocks(query_BTHd, pages, table_BJ, limit_BT, first, *, page):
    """Some queries after the other: no more than `MOST_SCORES` are held."""
    B, T, H, d = query_BTHd.shape
    size = T
    while size > 1 and B * H * size * pages.slots > MOST_SCORES:
        size = -(-size // 2)
    if size == T:
        return _over_stretches(query_BTHd, pages, table_BJ, limit_BT, page, first)
    missing = -T % size
    query = jnp.pad(query_BTHd, ((0, 0), (0, missing), (0, 0), (0, 0))).reshape(B, -1, size, H, d)
    limit = jnp.pad(limit_BT, ((0, 0), (0, missing)), constant_values=-1).reshape(B, -1, size)
    some = lax.map(
        lambda block: _over_stretches(block[0], pages, table_BJ, block[1], page, first), (query.swapaxes(0, 1), limit.swapaxes(0, 1))
    )
    return Partial(*(of_query_blocks(x, T) for x in some))


def _over_stretches(query_BTHd, pages, table_BJ, limit_BT, page, first):
    """One stretch of all rows after the other, as many as the longest row needs."""
    B, T, H, d = query_BTHd.shape
    K, P = pages.key_NKPd.shape[1:3]
    query = query_BTHd.reshape(B, T, K, H // K, d)

    def add(j, done):
        page_B = lax.dynamic_index_in_dim(table_BJ, j, axis=1, keepdims=False)
        key_BKPd, value_BKPd = (_look_up(x, scale, page_B, query.dtype) for x, scale in (pages[::2], pages[1::2]))
        slot_P = j * page + first + jnp.arange(P, dtype=jnp.int32)
        seen_BP = slot_P[None, :] <= limit_BT.max(axis=1)[:, None]
        value_BKPd = jnp.where(seen_BP[:, None, :, None], value_BKPd, 0)  # of no weight, and others' NaN times that is NaN
        scores = einsum("BTKGd,BKPd->BKGTP", query, key_BKPd) * d**-0.5
        scores = jnp.where((slot_P[None, None, :] <= limit_BT[:, :, None])[:, None, None], scores, MASKED)
        most = scores.max(axis=-1)
        weights = jnp.exp(scores - most[..., None])
        out = einsum("BKGTP,BKPd->BKGTd", weights.astype(value_BKPd.dtype), value_BKPd)
        return done.merge(Partial(out, weights.sum(axis=-1), most))

    zeros = jnp.zeros((B, K, H // K, T), jnp.float32)
    nothing = Partial(jnp.zeros((*zeros.shape, d), jnp.float32), zeros, zeros + MASKED)
    return lax.fori_loop(0, limit_BT.max() // page + 1, add, nothing)


def _look_up(stored_NKPd, scale_NKP, page_B, dtype):
    """[B, K, P, d] keys or values of a page for each row. A single page is a slice, which XLA:CPU need not gather."""

    def take(x):
        return lax.dynamic_slice_in_dim(x, page_B[0], 1) if page_B.shape[0] == 1 else x.at[page_B].get(mode="promise_in_bounds")

    if scale_NKP is None:
        return as_floats(take(stored_NKPd), dtype)
    return (take(stored_NKPd).astype(jnp.float32) * take(scale_NKP)[..., None]).astype(dtype)


def write_tokens(pages: Pages, new: Keys, page_BT: jax.Array, slot_BT: jax.Array, first: jax.Array) -> Pages:
    """New keys and values into pages, in 8 bits where those are.

    Args:
      page_BT: int32, N for a token that goes nowhere.
      slot_BT: which slot of the whole page.
      first: [] int32, the first slot of a whole page that lies here.
    """
    slot_BT = slot_BT - first
    page_BT = jnp.where((slot_BT >= 0) & (slot_BT < pages.slots), page_BT, pages.key_NKPd.shape[0])

    def write(stored, new_BKT):
        return stored.at[page_BT, :, slot_BT].set(as_held(new_BKT.swapaxes(1, 2), stored.dtype), mode="drop")

    if pages.key_scale_NKP is None:
        return Pages(write(pages.key_NKPd, new.key_BKSd), write(pages.value_NKPd, new.value_BKSd))
    (key, key_scale), (value, value_scale) = quantize_keys(new.key_BKSd), quantize_keys(new.value_BKSd)
    return Pages(*(write(stored, x) for stored, x in zip(pages, (key, value, key_scale, value_scale), strict=True)))
