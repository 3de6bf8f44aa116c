"""What a caller hands to the model, checked before anything is computed: token ids, lengths, tiles, a cache.

Shapes and dtypes are checked under `jit` too; values where there are any.

Shape suffixes: B batch, T tokens, N tiles, C channels, S pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from maverick_jax.config import TextConfig, VisionConfig
from maverick_jax.config.checks import show
from maverick_jax.errors import UserError

if TYPE_CHECKING:
    from maverick_jax.inference.cache import KVCache

Array = jax.Array | np.ndarray
Rows = Array | Sequence[Sequence[int]]
Lengths = Array | Sequence[int]
BRIGHTEST = 2.0  # resampling may overshoot 1 a little; a picture in 0..255 was never scaled


def token_ids_of(token_ids: Any) -> Array:
    """[B, T] of any integer dtype."""
    ids = _array(token_ids, "token_ids")
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise UserError(f"token_ids is {_kind(ids)}: expected whole numbers [B, T], a row per prompt.")
    return ids


def lengths_of(lengths: Any, B: int, T: int) -> Array:
    """[B] int32, each of 0..T.

    Raises:
      UserError: another shape or dtype, or a length that no row of T tokens has.
    """
    lengths = _array(lengths, "lengths")
    if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise UserError(f"lengths is {_kind(lengths)}: expected {B} whole numbers, the real tokens of every row.")
    values = known(lengths)
    if values is not None and (values.min() < 0 or values.max() > T):
        raise UserError(f"lengths is {values.tolist()}: rows of {T} tokens have between 0 and {T} real ones.")
    return lengths.astype(jnp.int32)


def tiles_of(tiles: Any, vision: VisionConfig | None) -> Array | None:
    """[N, C, S, S] of any float dtype, or None if there are no tiles.

    Raises:
      UserError: tiles for a model without a vision tower, or that are not what `tile_image` makes.
    """
    pixels = _array(tiles, "tiles")
    if pixels.size == 0:
        return None
    if vision is None:
        raise UserError("this checkpoint has no vision tower: it takes text only.")
    one = (vision.num_channels, vision.image_size, vision.image_size)
    expected = f"float32 [N, {', '.join(map(str, one))}] in -1..1, as tile_image makes them"
    if pixels.shape[1:] != one or not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise UserError(f"tiles is {_kind(pixels)}: expected {expected}.")
    values = known(pixels)
    if values is not None and not (np.abs(values) <= BRIGHTEST).all():  # NaN included
        raise UserError(f"tiles has values from {values.min()} to {values.max()}: expected {expected}.")
    return pixels


def check_vocabulary(token_ids_BT: Array, real_BT: Array, vocabulary: int) -> None:
    """JAX takes an id outside the table for another one without a word."""
    ids, real = known(token_ids_BT), known(real_BT)
    if ids is not None and real is not None and ((ids < 0) | (ids >= vocabulary))[real].any():
        raise UserError(f"token_ids has ids outside 0..{vocabulary - 1}: is it from another tokenizer?")


def check_patches(is_patch_BT: Array, tiles: Array | None, vision: VisionConfig | None) -> None:
    """Every `<|patch|>` token takes one image feature, and none is left over."""
    patches = known(is_patch_BT)
    features = 0 if tiles is None or vision is None else tiles.shape[0] * vision.tokens_per_tile
    if patches is not None and patches.sum() != features:
        raise UserError(
            f"there are {patches.sum()} <|patch|> tokens, the tiles make {features} image features: pass every picture's tiles."
        )


def check_cache(cache: KVCache, config: TextConfig, added_B: Array) -> None:
    """Is the cache this model's, for as many rows, and is there room for the tokens that each row adds?"""
    if not hasattr(cache, "lengths_B"):
        raise UserError(f"cache is {show(cache)}: it must be a KVCache, which KVCache.create gives.")
    rows = cache.lengths_B.shape[0]
    buffers = {(rows, pages.key_NKPd.shape[1], pages.key_NKPd.shape[3]) for pages in cache.layers}
    mine = (added_B.shape[0], config.num_key_value_heads, config.head_dim)
    if len(cache.layers) != config.num_hidden_layers or buffers != {mine}:
        raise UserError(
            f"the cache has {len(cache.layers)} layers of (rows, key/value heads, head size) {sorted(buffers)}, this call needs "
            f"{config.num_hidden_layers} of {mine}: create it with this model's config and a batch of {mine[0]}."
        )
    held, added = known(cache.lengths_B), known(added_B)
    if held is None or added is None:
        return
    row = int((held + added).argmax())
    if held[row] + added[row] > cache.max_length:
        raise UserError(
            f"the cache has room for {cache.max_length} tokens; {held[row]} are in it and {added[row]} are added: "
            "create it with a larger max_length."
        )


def known(array: Array) -> np.ndarray | None:
    """The values, if this process can see them: neither under `jit` nor divided over several hosts."""
    if isinstance(array, Tracer):
        return None
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return None
    return np.asarray(array)  # NumPy, because under jit even a comparison of known values is traced


def _array(values: Any, name: str) -> Array:
    """On the host, where this process can see the values: on one device they could not meet a model on another."""
    try:
        seen = known(values if isinstance(values, jax.Array) else np.asarray(values))
    except (TypeError, ValueError, RuntimeError) as error:  # rows of different lengths; a tensor that wants its gradient; deleted
        raise UserError(f"{name} is no array ({error}).") from error
    return values if seen is None else seen


def _kind(array: Array) -> str:
    return f"{array.dtype} {list(array.shape)}"
