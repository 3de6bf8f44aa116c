"""Sorting few rows by group on GPU: one Pallas-Triton kernel, where XLA launches a sort and four more.

Shape suffixes: L rows, G groups, M rows or groups of a program.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from maverick_jax.ops.triton import load, store

AT_ONCE = 16  # rows, and groups, of a program
MOST_ROWS = 1024  # which every program compares with its own


# Under `jit` the kernel is traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("groups", "interpret"))
def sort_rows_gpu(group_L: jax.Array, groups: int, *, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `sort_rows`, up to `MOST_ROWS`. `interpret` runs the kernel as ordinary JAX operations, on any platform (for tests)."""
    rows = group_L.shape[0]
    order, place, sizes = pl.pallas_call(
        functools.partial(_kernel, groups=groups),
        grid=(pl.cdiv(max(rows, groups), AT_ONCE),),
        in_specs=[pl.no_block_spec],
        out_specs=[pl.no_block_spec] * 3,
        out_shape=[jax.ShapeDtypeStruct((size,), jnp.int32) for size in (rows, rows, groups - 1)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(group_L)
    return order, place, sizes


def _kernel(group_ref, order_ref, place_ref, sizes_ref, *, groups: int):
    rows = group_ref.shape[0]
    L = pl.next_power_of_2(rows)
    row_L = jnp.arange(L, dtype=jnp.int32)
    group_L = jnp.where(row_L < rows, load(group_ref.at[row_L], row_L < rows), groups)
    at = pl.ds(pl.program_id(0) * AT_ONCE, AT_ONCE)
    own_M = at.start + jnp.arange(AT_ONCE, dtype=jnp.int32)
    group_M = load(group_ref.at[at], own_M < rows)
    same_ML = group_L[None, :] == group_M[:, None]
    before_ML = (group_L[None, :] < group_M[:, None]) | (same_ML & (row_L[None, :] < own_M[:, None]))
    place_M = jnp.where(own_M < rows, before_ML.astype(jnp.int32).sum(axis=1), own_M)
    store(place_ref.at[at], place_M, own_M < rows)
    store(order_ref.at[place_M], own_M, own_M < rows)
    store(sizes_ref.at[at], (group_L[None, :] == own_M[:, None]).astype(jnp.int32).sum(axis=1), own_M < groups - 1)
