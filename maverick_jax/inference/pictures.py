"""Pictures in the engine: a key for every token, and features that are made once.

A tile is known by a digest of its pixels. The keys of its tokens are made of that, so that two prompts with different pictures
never share a prefix, and its features are kept for the next prompt that shows it.

Shape suffixes: N tiles, S pixels, P features of a tile, D model width, B rows, T tokens.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from maverick_jax.inference.sizes import next_power_of_two

TILES_AT_ONCE = 16  # per call of the vision tower
FEATURES = 2**30  # bytes kept
ADAPTER_BIT = 40  # of a key: no token's id comes so far


def digests(tiles_N3SS: np.ndarray | None) -> list[bytes]:
    return [] if tiles_N3SS is None else [hashlib.blake2b(np.ascontiguousarray(tile).data, digest_size=8).digest() for tile in tiles_N3SS]


def keys(ids_T: np.ndarray, image_token: int, tiles: Sequence[bytes], tokens_per_tile: int, adapter: int = 0) -> list[int]:
    """What tells each token from another one at its place: its id or, of a picture's, a negative number made of tile and feature.

    Under another adapter the first one is another: what begins otherwise shares nothing.
    """
    found = ids_T.tolist()
    for i, at in enumerate(np.flatnonzero(ids_T == image_token).tolist() if tiles else ()):
        tile, feature = divmod(i, tokens_per_tile)
        found[at] = -1 - (int.from_bytes(tiles[tile], "little") // 4 + feature)
    found[0] ^= adapter << ADAPTER_BIT
    return found


class Features:
    """Tiles' features on the devices, those used longest ago dropped first."""

    def __init__(self, encode: Callable[[np.ndarray], jax.Array], pick: Callable[[jax.Array, int], jax.Array], most: int = FEATURES):
        self._encode, self._pick, self._most = encode, pick, most
        self._kept: collections.OrderedDict[bytes, jax.Array] = collections.OrderedDict()
        self.encoded = 0

    def of(self, wanted: Sequence[bytes], tiles: Sequence[np.ndarray]) -> list[jax.Array]:
        """[P, D] of each tile, of whatever requests: [3, S, S] pixels and their digest."""
        missing = [i for i, digest in enumerate(wanted) if digest not in self._kept and digest not in wanted[:i]]
        made = {}
        for start in range(0, len(missing), TILES_AT_ONCE):
            group = missing[start : start + TILES_AT_ONCE]
            padded = np.zeros((next_power_of_two(len(group)), *tiles[0].shape), np.float32)
            padded[: len(group)] = [tiles[i] for i in group]
            features_NPD = self._encode(padded)
            made |= {wanted[i]: self._pick(features_NPD, place) for place, i in enumerate(group)}
        self.encoded += len(missing)
        found = [made[digest] if digest in made else self._kept[digest] for digest in wanted]
        for digest, features in zip(wanted, found, strict=True):
            self._kept[digest] = features
            self._kept.move_to_end(digest)
        held = sum(features.nbytes for features in self._kept.values())
        while self._kept and held > self._most:
            held -= self._kept.popitem(last=False)[1].nbytes
        return found
