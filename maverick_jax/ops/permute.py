"""Move rows to other places, with a gather in both directions.

The gradient of `x[index]` is a scatter-add, which accelerators run far slower than a gather. Where every row goes to one
place at most, the gradient is itself a gather, by the inverse index.
"""

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


def sort_rows(group: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """Stable order of rows by group.

    Args:
      group: [L] int32 in 0..groups - 1.

    Returns:
      [L] int32 `order`, so that `group[order]` ascends, and its inverse, the place of every row in that order.
    """
    rows = group.shape[0]
    assert groups * rows < 2**31
    row = jnp.arange(rows, dtype=jnp.int32)
    # One array of distinct numbers: the TPU compiler takes 4 s for such a sort of 65,536, for an argsort 13 s.
    order = lax.sort(group * rows + row, is_stable=False) % rows
    return order, jnp.zeros_like(row).at[order].set(row, unique_indices=True)
