"""Rows sorted by group, cut into tiles of one group each: the plan of work of the grouped matmul's kernels.

Tiles begin where their group begins. How many there are at most is known when a program is compiled, and those too many find no
rows. Rows without a group are one more group, which has no matrix.

Shape suffixes: R rows, E experts, G groups (the experts, and the rows without one), S tiles of rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """Tiles of rows, and behind them some without rows.

    Attributes:
      group_S: E for rows without a group.
      start_S: first row.
      end_S: end of the group, perhaps far behind the tile's.
    """

    group_S: jax.Array
    start_S: jax.Array
    end_S: jax.Array

    @classmethod
    def of(cls, group_sizes_E: jax.Array, rows: int, block: int, tiles: int) -> "Tiles":
        start_G, end_G = bounds(group_sizes_E, rows)
        tiles_G = -(-(end_G - start_G) // block)
        behind_G = jnp.cumsum(tiles_G)
        tile_S = jnp.arange(tiles, dtype=jnp.int32)
        # A tile too many falls to the last group, and begins where that has ended.
        group_S = (tile_S[:, None] >= behind_G[None, :-1]).sum(axis=1, dtype=jnp.int32)
        start_S = start_G[group_S] + (tile_S - (behind_G - tiles_G)[group_S]) * block
        return cls(group_S, start_S, end_G[group_S])


def most_tiles(rows: int, experts: int, block: int) -> int:
    """Each group that has rows has a tile, and another one for every `block` rows behind its first."""
    groups = min(rows, experts + 1)
    return groups + (rows - groups) // block


def bounds(group_sizes_E: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """First row and end of every group, the rows without an expert last; never behind the array, whatever the sizes say."""
    end_G = jnp.append(jnp.minimum(jnp.cumsum(group_sizes_E, dtype=jnp.int32), rows), jnp.int32(rows))
    return jnp.concatenate([jnp.zeros(1, jnp.int32), end_G[:-1]]), end_G
