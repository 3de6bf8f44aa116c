"""The GPU's kernels for integers, which plan the work of the others: as what they take the place of, run as ordinary operations."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from maverick_jax.ops.permute import sort_rows
from maverick_jax.ops.sort_rows_gpu import MOST_ROWS, sort_rows_gpu
from maverick_jax.ops.tiles import Tiles, most_tiles
from maverick_jax.ops.tiles_gpu import tiles_gpu


@pytest.mark.parametrize("groups", [2, 17, 129])
@pytest.mark.parametrize("rows", [2, 16, 37, MOST_ROWS])
def test_rows_are_sorted_and_counted(rows, groups):
    """By group and, in a group, as they were; the last group is of rows that belong to none, and is not counted."""
    group_L = np.random.default_rng(rows).integers(0, groups, rows).astype(np.int32)
    for form in (sort_rows, sort_rows_gpu):
        options = {"interpret": True} if form is sort_rows_gpu else {}
        order, place, sizes = form(jnp.asarray(group_L), groups, **options)
        assert_array_equal(order, np.argsort(group_L, kind="stable"))
        assert_array_equal(place[order], np.arange(rows))
        assert_array_equal(sizes, np.bincount(group_L, minlength=groups)[:-1])


@pytest.mark.parametrize(
    "sizes",
    [[3, 0, 5, 0, 33], [0, 0, 0], [64], [1] * 40, [100, 100], [0, 7, 0, 0, 0, 0, 0, 50]],
    ids=str,
)
@pytest.mark.parametrize("block", [16, 32])
def test_tiles_of_a_kernel_are_those_of_xla(sizes, block):
    """Groups without rows, rows without a group, more rows promised than there are, and tiles too many."""
    rows, sizes_E = 64, jnp.asarray(sizes, jnp.int32)
    count = most_tiles(rows, len(sizes), block) + 5
    for ours, expected in zip(tiles_gpu(sizes_E, rows, block, count, interpret=True), Tiles.of(sizes_E, rows, block, count), strict=True):
        assert_array_equal(ours, expected)
