"""Attention on a mesh: rows, heads and, where rows are few, the sequence lie on different devices (context parallelism).

Whole chunks on each device need nothing from another; elsewhere the keys and values are gathered.

Shape suffixes: B batch, T query tokens, S key slots, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from maverick_jax.ops.attention import Keys, Partial, attend, attend_apart, attend_in_order, partial_attention
from maverick_jax.ops.paged_attention import attend_pages, over_pages, write_tokens
from maverick_jax.ops.pages import Pages
from maverick_jax.sharding.layout import Layout, check_placed

QUERIES = ("attention_batch", "attention_sequence", "heads", None)
KEYS = ("attention_batch", "attention_sequence", "kv_heads", None)
PAGES = (None, "kv_heads", "attention_sequence", None)  # of each page a part: equal shares, whatever the rows


class Attend(Protocol):
    """Ways of attending, as in `ops.attention` and `ops.paged_attention`, and writing pages that may be divided."""

    def in_order(self, query_BTHd, key_BKTd, value_BKTd, chunk: int | None) -> jax.Array: ...

    def apart(self, query_BTHd, positions_BT, key_BKTd, value_BKTd, chunk: int) -> jax.Array: ...

    def over(self, query_BTHd, query_positions_BT, keys: Keys, chunk: int | None) -> Partial: ...

    def over_pages(self, query_BTHd, pages: Pages, table_BJ, limit_BT) -> Partial: ...

    def in_pages(self, query_BTHd, pages: Pages, table_BJ, limit_BT) -> jax.Array: ...

    def write(self, pages: Pages, new: Keys, page_BT, slot_BT) -> Pages: ...


@dataclasses.dataclass(frozen=True)
class AttendHere:
    """Everything on one device."""

    def in_order(self, query_BTHd, key_BKTd, value_BKTd, chunk):
        return attend_in_order(query_BTHd, key_BKTd, value_BKTd, chunk)

    def apart(self, query_BTHd, positions_BT, key_BKTd, value_BKTd, chunk):
        return attend_apart(query_BTHd, positions_BT, key_BKTd, value_BKTd, chunk)

    def over(self, query_BTHd, query_positions_BT, keys, chunk):
        return partial_attention(query_BTHd, query_positions_BT, keys, chunk)

    def over_pages(self, query_BTHd, pages, table_BJ, limit_BT):
        return over_pages(query_BTHd, pages, table_BJ, limit_BT, page=pages.slots, first=jnp.int32(0))

    def in_pages(self, query_BTHd, pages, table_BJ, limit_BT):
        return attend_pages(query_BTHd, pages, table_BJ, limit_BT, page=pages.slots, first=jnp.int32(0))

    def write(self, pages, new, page_BT, slot_BT):
        return write_tokens(pages, new, page_BT, slot_BT, jnp.int32(0))


@dataclasses.dataclass(frozen=True)
class AttendOnMesh:
    """Each device attends for its rows, heads and part of the sequence."""

    mesh: Mesh
    layout: Layout

    def __post_init__(self) -> None:
        check_placed(self.mesh, self.layout)

    def in_order(self, query_BTHd, key_BKTd, value_BKTd, chunk):
        rows, sequence, heads = self._divided(query_BTHd, key_BKTd)
        tokens = query_BTHd.shape[1] // math.prod(self.mesh.shape[a] for a in sequence)
        queries = PartitionSpec(rows, sequence, heads)
        if not sequence or (chunk is not None and tokens % chunk == 0):
            keys = PartitionSpec(rows, heads, sequence)
            return self._shard_map(functools.partial(attend_in_order, chunk=chunk), (queries, keys, keys))(query_BTHd, key_BKTd, value_BKTd)

        def behind(query, key, value):
            first = lax.axis_index(sequence) * tokens
            positions_BT = jnp.broadcast_to(first + jnp.arange(tokens, dtype=jnp.int32), query.shape[:2])
            key_positions_BS = jnp.broadcast_to(jnp.arange(key.shape[2], dtype=jnp.int32), (key.shape[0], key.shape[2]))
            return attend(query, positions_BT, Keys(key, value, key_positions_BS), chunk)

        keys = PartitionSpec(rows, heads)
        return self._shard_map(behind, (queries, keys, keys))(query_BTHd, key_BKTd, value_BKTd)

    def apart(self, query_BTHd, positions_BT, key_BKTd, value_BKTd, chunk):
        rows, sequence, heads = self._divided(query_BTHd, key_BKTd)
        if sequence:
            return self.over(query_BTHd, positions_BT, Keys(key_BKTd, value_BKTd, positions_BT), chunk).finish(query_BTHd.dtype)
        queries, keys = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
        local = self._shard_map(functools.partial(attend_apart, chunk=chunk), (queries, PartitionSpec(rows), keys, keys))
        return local(query_BTHd, positions_BT, key_BKTd, value_BKTd)

    def over(self, query_BTHd, query_positions_BT, keys, chunk):
        rows, sequence, heads = self._divided(query_BTHd, keys.key_BKSd)
        of_keys = Keys(PartitionSpec(rows, heads), PartitionSpec(rows, heads), PartitionSpec(rows))
        sums = PartitionSpec(rows, heads, None, sequence)
        local = self._shard_map(
            functools.partial(partial_attention, chunk=chunk),
            (PartitionSpec(rows, sequence, heads), PartitionSpec(rows, sequence), of_keys),
            Partial(sums, sums, sums),
        )
        return local(query_BTHd, query_positions_BT, keys)

    def over_pages(self, query_BTHd, pages, table_BJ, limit_BT):
        """Each device looks at its part of every page; only sums travel."""
        heads, sequence, of_pages = self._pages(pages)

        def part(query, pages, table, limit):
            own = over_pages(query, pages, table, limit, page=page, first=_first(sequence, pages))
            if not sequence:
                return own
            highest = lax.pmax(own.most_BKGT, sequence)
            shrink = jnp.exp(own.most_BKGT - highest)
            return Partial(*lax.psum((own.out_BKGTd * shrink[..., None], own.total_BKGT * shrink), sequence), highest)

        page, sums, whole = pages.slots, PartitionSpec(None, heads), PartitionSpec()
        local = self._shard_map(part, (PartitionSpec(None, None, heads), of_pages, whole, whole), Partial(sums, sums, sums))
        return local(query_BTHd, pages, table_BJ, limit_BT)

    def in_pages(self, query_BTHd, pages, table_BJ, limit_BT):
        heads, sequence, of_pages = self._pages(pages)
        if sequence:
            return self.over_pages(query_BTHd, pages, table_BJ, limit_BT).finish(query_BTHd.dtype)
        queries, whole = PartitionSpec(None, None, heads), PartitionSpec()
        here = functools.partial(attend_pages, page=pages.slots, first=jnp.int32(0))
        return self._shard_map(here, (queries, of_pages, whole, whole))(query_BTHd, pages, table_BJ, limit_BT)

    def write(self, pages, new, page_BT, slot_BT):
        """The partitioner would gather the pages: each device takes what falls into its part."""
        heads, sequence, of_pages = self._pages(pages)

        def part(pages, new, page_BT, slot_BT):
            return write_tokens(pages, new, page_BT, slot_BT, _first(sequence, pages))

        whole, of_new = PartitionSpec(), PartitionSpec(None, heads)
        local = self._shard_map(part, (of_pages, Keys(of_new, of_new, whole), whole, whole))
        return local(pages, new, page_BT, slot_BT)

    def _pages(self, pages):
        """Mesh axes of the heads and of a page's slots, and the pages' partition."""
        _, heads, sequence, _ = self.layout.split(PAGES, pages.key_NKPd.shape, self.mesh)
        sequence = tuple(axis for axis in sequence if self.mesh.shape[axis] > 1)  # where none is, no sums travel
        return heads, sequence, jax.tree.map(lambda _: PartitionSpec(None, heads, sequence), pages)

    def _divided(self, query_BTHd, key_BKSd):
        """Mesh axes of rows, sequence and heads. Query heads go with their key/value head, however the layout divides them."""
        B, T = query_BTHd.shape[:2]
        rows, sequence, heads, _ = self.layout.split(KEYS, (B, T, key_BKSd.shape[1], key_BKSd.shape[3]), self.mesh)
        return rows, sequence, heads

    def _shard_map(self, function, in_specs, out_specs=None):
        """What comes out lies like the first argument, unless `out_specs` says otherwise."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs or in_specs[0], check_vma=False)


def _first(sequence, pages):
    """[] int32 the first slot of a whole page that lies on this device."""
    return lax.axis_index(sequence) * pages.slots if sequence else jnp.int32(0)
