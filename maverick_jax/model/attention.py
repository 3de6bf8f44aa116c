"""Attention of the text decoder: RoPE layers attend within their chunk, the others globally with a temperature.

Shape suffixes: B batch, T tokens, S key slots, D model width, H query heads, K key/value heads, d head size.
Source: Llama 4 reference, `models/llama4/model.py`; spec sections 2.1 to 2.3.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from maverick_jax.config import TextConfig
from maverick_jax.model.parameter import weight
from maverick_jax.ops.attention import Keys, temperature_scale
from maverick_jax.ops.linear import linear
from maverick_jax.ops.norm import rms_norm
from maverick_jax.ops.rope import inverse_frequencies, rotate, text_angles
from maverick_jax.sharding.attend import KEYS, QUERIES, Attend

FEW = 8  # tokens of a row at most: decoding, and drafts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Piece:
    """Where the tokens of a call stand in their rows.

    Attributes:
      start_B: tokens that each row held before.
      lengths_B: real tokens of each row in this call; the rest of the row is padding on the right.
      positions_BT: position of every token, padding included.
      document_BT: which of its row's documents a token belongs to, each of which sees itself alone; -1 is padding. None: one per row.
      first: no row held any.
      within_chunk: no row begins in one chunk and ends in another.
    """

    start_B: jax.Array
    lengths_B: jax.Array
    positions_BT: jax.Array
    document_BT: jax.Array | None = None
    first: bool = dataclasses.field(default=False, metadata={"static": True})
    within_chunk: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(cls, start_B: jax.Array, lengths_B: jax.Array, T: int, *, first: bool = False, within_chunk: bool = False) -> "Piece":
        positions_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
        return cls(start_B, lengths_B, positions_BT, first=first, within_chunk=within_chunk or T == 1)

    @classmethod
    def packed(cls, document_BT: jax.Array) -> "Piece":
        """Rows of several documents, one behind the other: every document begins at position 0."""
        B, T = document_BT.shape
        index_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        begins_BT = document_BT != jnp.pad(document_BT, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]
        positions_BT = index_BT - lax.cummax(jnp.where(begins_BT, index_BT, 0), axis=1)
        return cls(jnp.zeros((B,), jnp.int32), jnp.full((B,), T, jnp.int32), positions_BT, document_BT, first=True)

    @property
    def end_B(self) -> jax.Array:
        return self.start_B + self.lengths_B

    @property
    def real_BT(self) -> jax.Array:
        """True for tokens, False for padding."""
        if self.document_BT is not None:
            return self.document_BT >= 0
        return jnp.arange(self.positions_BT.shape[1])[None, :] < self.lengths_B[:, None]

    def begins_chunks(self, chunk: int) -> jax.Array:
        """[] bool: every row that has tokens begins with the first of a chunk."""
        return ((self.start_B % chunk == 0) | (self.lengths_B == 0)).all()

    def apart(self, chunk: int | None) -> tuple[jax.Array, int]:
        """Positions at which documents lie so far apart that no chunk holds parts of two, those of padding negative; and that chunk."""
        assert self.document_BT is not None
        T = self.positions_BT.shape[1]
        room = -(-T // chunk) * chunk if chunk else T
        return self.document_BT * room + self.positions_BT, chunk or room

    @property
    def last(self) -> "Piece":
        """The last token of every row, a piece of its own; a row without tokens has none there either."""
        lengths = jnp.minimum(self.lengths_B, 1)
        return Piece.of(self.end_B - lengths, lengths, 1)

    def pick_last(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, 1, D], what belongs to `last`."""
        return jnp.take_along_axis(x_BTD, jnp.maximum(self.lengths_B - 1, 0)[:, None, None], axis=1)


class Attention(nnx.Module):
    """Self-attention of one layer."""

    def __init__(self, config: TextConfig, layer: int, *, attend: Attend, constrain: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        D, H, K, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.query = weight(rngs, (D, H, d), ("embed", "heads", None), dtype)
        self.key = weight(rngs, (D, K, d), ("embed", "kv_heads", None), dtype)
        self.value = weight(rngs, (D, K, d), ("embed", "kv_heads", None), dtype)
        self.output = weight(rngs, (H, d, D), ("heads", None, "embed"), dtype, inputs=2)
        self.config = config
        self.uses_rope = layer not in config.nope_layers
        self.chunk = config.chunk_of_layer(layer)
        self.attend = attend
        self.constrain = constrain

    def __call__(self, x_BTD: jax.Array, piece: Piece, cache: Any = None, *, last_only: bool = False) -> tuple[jax.Array, Any]:
        """Attend within the piece and to what the cache holds.

        Args:
          cache: the layer's, or None.
          last_only: only the last token of every row asks; all are seen and cached.

        Returns:
          [B, T, D] ([B, 1, D] with last_only) and the new layer cache (None without).
        """
        asking_BTD, asking = (piece.pick_last(x_BTD), piece.last) if last_only else (x_BTD, piece)
        query = self.constrain(linear(asking_BTD, self.query[...]), QUERIES)
        key = self.constrain(linear(x_BTD, self.key[...]), KEYS)
        value = self.constrain(linear(x_BTD, self.value[...]), KEYS)
        if self.uses_rope:
            query, key = self._rotate_and_norm(query, asking), self._rotate_and_norm(key, piece)
        else:
            query = self._scale(query, asking)
        new = Keys(key.swapaxes(1, 2), value.swapaxes(1, 2), piece.positions_BT)
        if cache is None or piece.first:
            out = self._first(query, asking, new, last_only)
            cache = None if cache is None else self._written(cache, new, piece)
        else:
            out, cache = self._behind(query, asking, new, piece, cache)
        out = self.constrain(out, QUERIES)
        return linear(out, self.output[...], contract=2), cache

    def _first(self, query, asking, new, last_only):
        """The piece is all there is."""
        if asking.document_BT is not None:
            positions_BT, chunk = asking.apart(self.chunk)
            return self.attend.apart(query, positions_BT, new.key_BKSd, new.value_BKSd, chunk)
        if last_only:
            return self.attend.over(query, asking.positions_BT, new, self.chunk).finish(query.dtype)
        return self.attend.in_order(query, new.key_BKSd, new.value_BKSd, self.chunk)

    def _behind(self, query, asking, new, piece, cache):
        """The piece comes after what the cache holds.

        At the beginning of a chunk that is nothing which a layer with chunks sees: its tokens attend among themselves, by the kernels
        for that. A piece over a border overwrites what its own first tokens still see there: those read first. So do a few tokens on a
        TPU, which stages on the chip what is read after it is written, and copies all of it back. The others do not keep a read ahead
        of a write, and copy the whole buffer to be safe.
        """

        def read(query, new, cache):
            return self.attend.in_pages(query, cache.pages, cache.table_BJ, cache.seen_after(asking))

        def among_themselves(query, new, cache):
            return self.attend.in_order(query, new.key_BKSd, new.value_BKSd, self.chunk)

        def read_then_write(query, new, cache):
            before = self.attend.over_pages(query, cache.pages, cache.table_BJ, cache.seen_before(asking, piece.start_B))
            out = before.merge(self.attend.over(query, asking.positions_BT, new, self.chunk)).finish(query.dtype)
            return out, self._written(cache, new, piece)

        def write_then_read(query, new, cache):
            cache = self._written(cache, new, piece)
            if self.chunk is None or query.shape[1] <= FEW:
                return read(query, new, cache), cache
            return lax.cond(piece.begins_chunks(self.chunk), among_themselves, read, query, new, cache), cache

        if self.chunk is not None and not piece.within_chunk:
            return read_then_write(query, new, cache)
        if query.shape[1] > FEW:
            return write_then_read(query, new, cache)
        return lax.platform_dependent(query, new, cache, tpu=read_then_write, default=write_then_read)

    def _written(self, cache, new, piece):
        return cache.written(self.attend.write(cache.pages, new, *cache.places(piece)))

    def _rotate_and_norm(self, x, piece):
        """RoPE, then (Scout) the weightless norm per head. Within a chunk only differences of positions matter."""
        positions = piece.positions_BT if self.chunk is None else piece.positions_BT % self.chunk
        config = self.config
        angles = text_angles(positions, inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))
        x = rotate(x, angles)
        return rms_norm(x, None, config.rms_norm_eps) if config.use_qk_norm else x

    def _scale(self, query, piece):
        config = self.config
        if not config.attn_temperature_tuning:
            return query
        scale = temperature_scale(piece.positions_BT, floor_scale=config.floor_scale, attn_scale=config.attn_scale)
        return (query.astype(jnp.float32) * scale[:, :, None, None]).astype(query.dtype)
