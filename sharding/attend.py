"""Attention on a mesh: rows, heads and, where rows are few, the sequence lie on different devices (context parallelism).

Whole chunks on each device need nothing from another; elsewhere the keys and values are gathered.

Shape suffixes: B batch, T query tokens, S key slots, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from maverick_jax.ops.attention import Keys, Partial, attend, attend_in_order, partial_attention, write_slots
from maverick_jax.sharding.layout import Layout, check_placed

QUERIES = ("attention_batch", "attention_sequence", "heads", None)
KEYS = ("attention_batch", "attention_sequence", "kv_heads", None)
CACHE = ("attention_batch", "kv_heads", "attention_sequence", None)


class Attend(Protocol):
    """Both ways of attending, as in `ops.attention`, and writing keys or values into a cache that may be divided like them."""

    def write(self, buffer_BKSd, new_BKTd, slots_BT) -> jax.Array: ...

    def over(self, query_BTHd, query_positions_BT, seen: Sequence[Keys], chunk: int | None) -> jax.Array: ...

    def in_order(self, query_BTHd, key_BKTd, value_BKTd, chunk: int | None) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class AttendHere:
    """Everything on one device."""

    def write(self, buffer_BKSd, new_BKTd, slots_BT):
        return write_slots(buffer_BKSd, new_BKTd, slots_BT)

    def over(self, query_BTHd, query_positions_BT, seen, chunk):
        return attend(query_BTHd, query_positions_BT, seen, chunk)

    def in_order(self, query_BTHd, key_BKTd, value_BKTd, chunk):
        return attend_in_order(query_BTHd, key_BKTd, value_BKTd, chunk)


@dataclasses.dataclass(frozen=True)
class AttendOnMesh:
    """Each device attends for its rows, heads and part of the sequence."""

    mesh: Mesh
    layout: Layout

    def __post_init__(self) -> None:
        check_placed(self.mesh, self.layout)

    def write(self, buffer_BKSd, new_BKTd, slots_BT):
        rows, kv_heads, sequence, _ = self.layout.split(CACHE, buffer_BKSd.shape, self.mesh)
        if not sequence:
            return write_slots(buffer_BKSd, new_BKTd, slots_BT)

        def part(buffer, new, slots):
            """The partitioner would gather the buffer: each device takes what falls into its part."""
            S = buffer.shape[2]
            own = slots - lax.axis_index(sequence) * S
            return write_slots(buffer, new, jnp.where((own >= 0) & (own < S), own, S))

        buffers = PartitionSpec(rows, kv_heads, sequence)
        local = self._shard_map(part, (buffers, PartitionSpec(rows, kv_heads), PartitionSpec(rows)))
        return local(buffer_BKSd, new_BKTd, slots_BT)

    def over(self, query_BTHd, query_positions_BT, seen, chunk):
        if query_BTHd.shape[1] == 1:
            parts = (self._partial(query_BTHd, query_positions_BT, keys, chunk) for keys in seen)
            return functools.reduce(Partial.merge, parts).finish(query_BTHd.dtype)
        rows, sequence, heads = self._divided(query_BTHd, seen[0].key_BKSd)
        keys = Keys(PartitionSpec(rows, heads), PartitionSpec(rows, heads), PartitionSpec(rows))
        local = self._shard_map(
            functools.partial(attend, chunk=chunk),
            (PartitionSpec(rows, sequence, heads), PartitionSpec(rows, sequence), [keys] * len(seen)),
        )
        return local(query_BTHd, query_positions_BT, list(seen))

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
            return attend(query, positions_BT, [Keys(key, value, key_positions_BS)], chunk)

        keys = PartitionSpec(rows, heads)
        return self._shard_map(behind, (queries, keys, keys))(query_BTHd, key_BKTd, value_BKTd)

    def _partial(self, query_B1Hd, query_positions_B1, keys, chunk):
        """One token's: each device looks at its part of the sequence; only sums travel."""
        rows, kv_heads, sequence, _ = self.layout.split(CACHE, keys.key_BKSd.shape, self.mesh)
        if not sequence:  # plain operations, which the compiler divides and fuses better than a region of our own
            return partial_attention(query_B1Hd, keys, query_positions_B1, chunk)

        def part(query, positions, keys):
            out, total, most = partial_attention(query, keys, positions, chunk)
            highest = lax.pmax(most, sequence)
            shrink = jnp.exp(most - highest)
            return Partial(*lax.psum((out * shrink[..., None], total * shrink), sequence), highest)

        buffers, sums = PartitionSpec(rows, kv_heads, sequence), PartitionSpec(rows, kv_heads)
        in_specs = (PartitionSpec(rows, None, kv_heads), PartitionSpec(rows), Keys(buffers, buffers, PartitionSpec(rows, sequence)))
        return self._shard_map(part, in_specs, Partial(sums, sums, sums))(query_B1Hd, query_positions_B1, keys)

    def _divided(self, query_BTHd, key_BKSd):
        """Mesh axes of rows, sequence and heads. Query heads go with their key/value head, however the layout divides them."""
        B, T = query_BTHd.shape[:2]
        rows, sequence, heads, _ = self.layout.split(KEYS, (B, T, key_BKSd.shape[1], key_BKSd.shape[3]), self.mesh)
        return rows, sequence, heads

    def _shard_map(self, function, in_specs, out_specs=None):
        """What comes out lies like the first argument, unless `out_specs` says otherwise."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs or in_specs[0], check_vma=False)
