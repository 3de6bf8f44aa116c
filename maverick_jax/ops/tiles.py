"""Rows sorted by group, cut into tiles of one group each: the plan of work of the grouped matmul's kernels.

Tiles begin where their group begins. How many there are at most is known when a program is compiled, and those too many find no
rows. Rows without a group are one more group, which has no matrix.

Shape suffixes: R rows, E experts, G groups (the experts, and the rows without one), S tiles of rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

TILES_AT_ONCE = 8
PROGRAMS = 256  # keep the memory of a large GPU busy; fewer are given parts of the sums
MOST_PARTS = 8


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


class Block(NamedTuple):
    """What a program of a kernel on GPU multiplies at a time, and how it is run."""

    rows: int
    columns: int
    inputs: int
    warps: int
    stages: int


def rows_of_tile(rows: int, experts: int) -> int:
    """About the mean group; a tensor core takes 16 at least, and registers hold 128."""
    mean = -(-rows // experts)
    return min(128, max(16, 1 << (mean - 1).bit_length()))


class Grid(NamedTuple):
    """The programs of a kernel on GPU, each of which multiplies a tile of rows by some columns, over a part of the inputs.

    Attributes:
      at_once: tiles that sweep the columns together: those of one group share its matrix in the L2 cache, and all columns the rows.
      columns: blocks of columns.
      sweeps: as many times `at_once` as there may be tiles.
      parts: of the inputs' blocks.
    """

    at_once: int
    columns: int
    sweeps: int
    parts: int

    @classmethod
    def of(cls, tiles: int, columns: int, steps: int) -> "Grid":
        """`tiles` of rows at most, blocks of columns, and blocks of inputs."""
        at_once = min(TILES_AT_ONCE, tiles)
        wanted = min(MOST_PARTS, -(-PROGRAMS // (tiles * columns)))
        return cls(at_once, columns, -(-tiles // at_once), max(p for p in range(1, wanted + 1) if steps % p == 0))

    @property
    def programs(self) -> tuple[int, int, int]:
        """The first axis runs fastest."""
        return self.at_once, self.columns * self.parts, self.sweeps


def most_tiles(rows: int, experts: int, block: int) -> int:
    """Each group that has rows has a tile, and another one for every `block` rows behind its first."""
    groups = min(rows, experts + 1)
    return groups + (rows - groups) // block


def bounds(group_sizes_E: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """First row and end of every group, the rows without an expert last; never behind the array, whatever the sizes say."""
    end_G = jnp.append(jnp.minimum(jnp.cumsum(group_sizes_E, dtype=jnp.int32), rows), jnp.int32(rows))
    return jnp.concatenate([jnp.zeros(1, jnp.int32), end_G[:-1]]), end_G
