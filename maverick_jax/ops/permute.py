"""Move rows to other places, with a gather in both directions.

The gradient of `x[index]` is a scatter-add, which accelerators run far slower than a gather. Where every row goes to one
place at most, the gradient is itself a gather, by the inverse index.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def take_rows(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """`y[m] = x[index[m]]`; zero where `index` is x's length.

    Args:
      x: [L, ...].
      index: [M] int32 in 0..L, no row but L twice.
      inverse: [L] int32 in 0..M: where each row of x went; M for nowhere. Only the gradient reads it.

    Returns:
      [M, ...] in x's dtype.
    """
    return _take(x, index)


def _take(x, index):
    return x.at[index].get(mode="fill", fill_value=0)


def _forward(x, index, inverse):
    return _take(x, index), inverse


def _backward(inverse, dy):
    return _take(dy, inverse), None, None


take_rows.defvjp(_forward, _backward)


def sort_rows(group_L: jax.Array, groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Stable order of rows by group.

    Args:
      group_L: int32 in 0..groups - 1.

    Returns:
      [L] int32 `order`, so that `group_L[order]` ascends; its inverse, the place of every row in that order; and [groups - 1] int32 the
      rows of every group but the last, that of rows which belong to none.
    """
    assert groups * group_L.shape[0] < 2**31
    default, on_gpu = (functools.partial(form, groups=groups) for form in (_sort_rows, _sort_rows_on_gpu))
    return lax.platform_dependent(group_L, cuda=on_gpu, default=default)


def _sort_rows(group_L, groups):
    rows = group_L.shape[0]
    row_L = jnp.arange(rows, dtype=jnp.int32)
    # One array of distinct numbers: the TPU compiler takes 4 s for such a sort of 65,536, for an argsort 13 s.
    order = lax.sort(group_L * rows + row_L, is_stable=False) % rows
    return order, jnp.zeros_like(row_L).at[order].set(row_L, unique_indices=True), count_rows(group_L, groups - 1)


def _sort_rows_on_gpu(group_L, groups):
    # Importing Pallas takes a while, and other platforms do without.
    from maverick_jax.ops.sort_rows_gpu import MOST_ROWS, sort_rows_gpu

    return (sort_rows_gpu if 1 < group_L.shape[0] <= MOST_ROWS else _sort_rows)(group_L, groups)


def count_rows(group_L: jax.Array, groups: int) -> jax.Array:
    """[groups] int32 rows of each group; those of no group count for none."""
    return (group_L[:, None] == jnp.arange(groups, dtype=group_L.dtype)[None, :]).sum(axis=0, dtype=jnp.int32)
