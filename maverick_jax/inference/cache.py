"""The key/value cache: pages, and for every row a table of those that are its own.

A RoPE layer sees its own chunk, so a row has as many slots there as a chunk has tokens: position p lies in slot p mod chunk, in
pages that belong to the row's place in the batch for good. A NoPE layer sees the whole context: its pages come from a pool
that all rows share. At 1M tokens Maverick takes 49 GiB instead of 192.

Shape suffixes: B rows, T tokens, J stretches of a row (a page each), N pages, P slots of a page, K key/value heads, d head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike

from maverick_jax.config import TextConfig
from maverick_jax.errors import UserError
from maverick_jax.inference.checks import Range, shown, whole
from maverick_jax.model.attention import Piece
from maverick_jax.model.parameter import float_dtype
from maverick_jax.ops.paged_attention import Pages
from maverick_jax.sharding.attend import PAGES

ROOM = Range(whole, 1, 2**31 - 1, "a whole number, 1 or more")
PAGE = 512  # slots of a page at most: of each, every device that divides the sequence holds a part


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerRows:
    """What the rows of a call have of one layer.

    Attributes:
      pages: of all rows.
      table_BJ: int32, the page of every stretch of a row.
      chunk: tokens per chunk, or None: the row's slots are its positions.
      page: slots of a page.
    """

    pages: Pages
    table_BJ: jax.Array
    chunk: int | None = dataclasses.field(metadata={"static": True})
    page: int = dataclasses.field(metadata={"static": True})

    def slot(self, positions: jax.Array) -> jax.Array:
        return positions if self.chunk is None else positions % self.chunk

    def places(self, piece: Piece) -> tuple[jax.Array, jax.Array]:
        """[B, T] page and slot in it of a piece's tokens: page N for padding, and for what a later token of the piece overwrites."""
        kept_BT = piece.real_BT
        if self.chunk is not None:
            kept_BT &= piece.positions_BT >= piece.end_B[:, None] - self.chunk
        slot_BT = self.slot(piece.positions_BT)
        stretch_BT = jnp.minimum(slot_BT // self.page, self.table_BJ.shape[1] - 1)
        page_BT = jnp.take_along_axis(self.table_BJ, stretch_BT, axis=1)
        return jnp.where(kept_BT, page_BT, self.pages.key_NKPd.shape[0]), slot_BT % self.page

    def seen_after(self, piece: Piece) -> jax.Array:
        """[B, T] the last slot that each token sees once the piece is written; no row of it crosses a chunk border."""
        return jnp.where(piece.real_BT, self.slot(piece.positions_BT), -1)

    def seen_before(self, asking: Piece, start_B: jax.Array) -> jax.Array:
        """[B, T] the last slot that each token sees of what the rows held when they ended at `start_B`."""
        limit_BT = jnp.broadcast_to(self.slot(start_B)[:, None] - 1, asking.positions_BT.shape)
        if self.chunk is not None:
            limit_BT = jnp.where(asking.positions_BT // self.chunk == start_B[:, None] // self.chunk, limit_BT, -1)
        return jnp.where(asking.real_BT, limit_BT, -1)

    def written(self, pages: Pages) -> LayerRows:
        return dataclasses.replace(self, pages=pages)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cache of all layers, and some rows of it.

    Attributes:
      layers: the pages of every layer.
      place_B: int32, which of the places a row has: its own pages in the layers with chunks.
      table_BJ: int32, the pages of every row in the layers that see everything.
      lengths_B: int32 tokens held per row.
      max_length: tokens a row has room for.
      chunks: tokens per chunk of every layer, or None.
      page: slots of a page.
    """

    layers: tuple[Pages, ...]
    place_B: jax.Array
    table_BJ: jax.Array
    lengths_B: jax.Array
    max_length: int = dataclasses.field(metadata={"static": True})
    chunks: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    page: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(cls, config: TextConfig, batch: int, max_length: int, dtype: DTypeLike, constrain: Any = None) -> KVCache:
        """An empty cache for `batch` rows of up to `max_length` tokens, all of them reserved.

        Args:
          config: of the text decoder, `model.config.text`.
          dtype: of keys and values; the model's.
          constrain: the model's, which places the pages on its mesh.

        Raises:
          UserError: an argument is none of these.
        """
        if not isinstance(config, TextConfig):
            raise UserError(f"config is {shown(config)}: it must be a TextConfig, such as model.config.text.")
        batch, max_length = (ROOM.check(name, value) for name, value in (("batch", batch), ("max_length", max_length)))
        page = page_size(config, max_length)
        stretches = -(-max_length // page)
        layers = make_pages(config, batch, batch * stretches, max_length, page, dtype, constrain)
        row_B = jnp.arange(batch, dtype=jnp.int32)
        table_BJ = row_B[:, None] * stretches + jnp.arange(stretches, dtype=jnp.int32)[None, :]
        chunks = tuple(config.chunk_of_layer(i) for i in range(config.num_hidden_layers))
        return cls(layers, row_B, table_BJ, jnp.zeros((batch,), jnp.int32), max_length, chunks, page)

    def rows(self) -> list[LayerRows]:
        """What each layer looks at."""
        found = []
        for pages, chunk in zip(self.layers, self.chunks, strict=True):
            table_BJ = self.table_BJ
            if chunk is not None:
                own = pages_per_chunk(chunk, self.max_length, self.page)
                table_BJ = self.place_B[:, None] * own + jnp.arange(own, dtype=jnp.int32)[None, :]
            found.append(LayerRows(pages, table_BJ, chunk, self.page))
        return found

    def advanced(self, rows: Sequence[LayerRows], lengths_B: jax.Array) -> KVCache:
        return dataclasses.replace(self, layers=tuple(layer.pages for layer in rows), lengths_B=lengths_B)

    def __repr__(self) -> str:
        """A line, whatever stands for the arrays: under `jit` and in trees of specs too."""
        room, held = f"up to {self.max_length:,} tokens", self.lengths_B
        if not isinstance(held, jax.Array) or isinstance(held, Tracer) or not held.is_fully_addressable:
            return f"KVCache({len(self.layers)} layers, rows of {room})"
        return f"KVCache({len(self.layers)} layers, {len(held)} rows of {room}, {shown(held.tolist())} in them)"

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.layers))


# Among several processes no single one could make an array that lies on the devices of all.
new_cache = jax.jit(KVCache.create, static_argnums=(0, 1, 2, 3, 4))


def page_size(config: TextConfig, max_length: int) -> int:
    """Slots of a page: as many as divide every chunk, so that a chunk's end is a page's."""
    chunk = next((c for i in range(config.num_hidden_layers) if (c := config.chunk_of_layer(i))), None)
    if chunk is None or max_length <= chunk:
        return min(PAGE, max_length)
    return max(size for size in range(1, min(PAGE, chunk) + 1) if chunk % size == 0)


def pages_per_chunk(chunk: int, max_length: int, page: int) -> int:
    return -(-min(chunk, max_length) // page)


def make_pages(
    config: TextConfig, places: int, pages: int, max_length: int, page: int, dtype: DTypeLike, constrain: Any = None
) -> tuple[Pages, ...]:
    """Empty pages of every layer: `pages` of those that see everything, and those of each place of a batch in the others."""
    dtype, layers = float_dtype(dtype), []
    for i in range(config.num_hidden_layers):
        chunk = config.chunk_of_layer(i)
        count = pages if chunk is None else places * pages_per_chunk(chunk, max_length, page)
        made = Pages(*(jnp.zeros((count, config.num_key_value_heads, page, config.head_dim), dtype) for _ in range(2)))
        layers.append(made if constrain is None else Pages(*(constrain(x, PAGES) for x in made)))
    return tuple(layers)
