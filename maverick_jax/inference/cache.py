"""The key/value cache: one buffer per layer, never longer than the layer can see.

A RoPE layer sees its own chunk, so its buffer has `chunk` slots and position p lives in slot p mod chunk; the entries of
the old chunk are masked until they are overwritten. A NoPE layer keeps the whole context. At 1M tokens Maverick takes
49 GiB instead of 192.

Shape suffixes: B batch, T new tokens, S slots, K key/value heads, d head size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike

from maverick_jax.config import TextConfig
from maverick_jax.errors import UserError
from maverick_jax.inference.checks import Range, shown, whole
from maverick_jax.model.attention import Piece
from maverick_jax.model.parameter import float_dtype
from maverick_jax.ops.attention import Keys
from maverick_jax.sharding.attend import CACHE

ROOM = Range(whole, 1, 2**31 - 1, "a whole number, 1 or more")
Write = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer. `fresh` (static): nothing has been written."""

    key_BKSd: jax.Array
    value_BKSd: jax.Array
    fresh: bool = dataclasses.field(metadata={"static": True})
    wraps: bool = dataclasses.field(metadata={"static": True})

    def append(self, new: Keys, piece: Piece, write: Write) -> tuple[LayerCache, list[Keys]]:
        """Write a piece by `write(buffer, new, slots)`.

        Returns:
          The new cache and what the piece's queries may see.
        """
        put = _first_piece if self.fresh else functools.partial(_further_piece, write=write)
        key, value = put(self.key_BKSd, new.key_BKSd, piece), put(self.value_BKSd, new.value_BKSd, piece)
        written = dataclasses.replace(self, key_BKSd=key, value_BKSd=value, fresh=False)
        if self.fresh:  # the piece is all there is
            return written, [new]
        if new.key_BKSd.shape[2] == 1 or not self.wraps:
            return written, [Keys(key, value, _positions(piece.end_B, self.key_BKSd.shape[2]))]
        # A longer piece may overwrite slots that its own first tokens still see.
        return written, [self.before(piece), new]

    def before(self, piece: Piece) -> Keys:
        """What is held before the piece is written."""
        return Keys(self.key_BKSd, self.value_BKSd, _positions(piece.start_B, self.key_BKSd.shape[2]))


def _first_piece(buffer_BKSd, new_BKTd, piece):
    """Position p is token p: the piece as it is or, of one longer than the buffer, each slot's last token.

    Padding lands in slots that a later token overwrites before anyone sees them: `_positions` calls them empty.
    """
    S, new_BKTd = buffer_BKSd.shape[2], new_BKTd.astype(buffer_BKSd.dtype)
    if new_BKTd.shape[2] <= S:
        return lax.dynamic_update_slice_in_dim(buffer_BKSd, new_BKTd, 0, axis=2)
    return jnp.take_along_axis(new_BKTd, jnp.maximum(_positions(piece.end_B, S), 0)[:, None, :, None], axis=2)


def _further_piece(buffer_BKSd, new_BKTd, piece, *, write):
    """The piece's real tokens into slots position mod S; of a piece longer than the buffer, the last S tokens."""
    S = buffer_BKSd.shape[2]
    kept = piece.real_BT & (piece.positions_BT >= piece.end_B[:, None] - S)
    return write(buffer_BKSd, new_BKTd, jnp.where(kept, piece.positions_BT % S, S))


def _positions(end_B, S):
    """[B, S] position held by every slot of rows that end before `end_B`; negative: empty."""
    last = end_B[:, None] - 1
    return last - (last - jnp.arange(S, dtype=jnp.int32)[None, :]) % S


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cache of all layers for a batch of rows.

    Attributes:
      layers: one `LayerCache` per layer.
      lengths_B: [B] int32 tokens held per row.
      max_length: tokens a row has room for.
    """

    layers: tuple[LayerCache, ...]
    lengths_B: jax.Array
    max_length: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(cls, config: TextConfig, batch: int, max_length: int, dtype: DTypeLike, constrain: Any = None) -> KVCache:
        """An empty cache for `batch` rows of up to `max_length` tokens.

        Args:
          config: of the text decoder, `model.config.text`.
          dtype: of keys and values; the model's.
          constrain: the model's, which places the buffers on its mesh.

        Raises:
          UserError: an argument is none of these.
        """
        if not isinstance(config, TextConfig):
            raise UserError(f"config is {shown(config)}: it must be a TextConfig, such as model.config.text.")
        batch, max_length = (ROOM.check(name, value) for name, value in (("batch", batch), ("max_length", max_length)))
        dtype, layers = float_dtype(dtype), []
        for i in range(config.num_hidden_layers):
            chunk = config.chunk_of_layer(i)
            slots = max_length if chunk is None else min(chunk, max_length)
            buffers = [jnp.zeros((batch, config.num_key_value_heads, slots, config.head_dim), dtype) for _ in range(2)]
            if constrain is not None:
                buffers = [constrain(b, CACHE) for b in buffers]
            layers.append(LayerCache(*buffers, fresh=True, wraps=slots < max_length))
        return cls(tuple(layers), jnp.zeros((batch,), jnp.int32), max_length)

    def advanced(self, layers: tuple[LayerCache, ...], lengths_B: jax.Array) -> KVCache:
        return dataclasses.replace(self, layers=layers, lengths_B=lengths_B)

    def __repr__(self) -> str:
        """A line, whatever stands for the arrays: under `jit` and in trees of specs too."""
        room, held = f"up to {self.max_length:,} tokens", self.lengths_B
        if not isinstance(held, jax.Array) or isinstance(held, Tracer) or not held.is_fully_addressable:
            return f"KVCache({len(self.layers)} layers, rows of {room})"
        return f"KVCache({len(self.layers)} layers, {len(held)} rows of {room}, {shown(held.tolist())} in them)"

    @property
    def nbytes(self) -> int:
        return sum(layer.key_BKSd.nbytes + layer.value_BKSd.nbytes for layer in self.layers)


# Among several processes no single one could make an array that lies on the devices of all.
new_cache = jax.jit(KVCache.create, static_argnums=(0, 1, 2, 3, 4))
