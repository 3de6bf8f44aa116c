"""`Tiles` on GPU: one Pallas-Triton kernel, where XLA launches four, for a handful of numbers each.

Shape suffixes: E experts, G groups (the experts, the rows without one, and up to a power of two nothing), S tiles of rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from maverick_jax.ops.tiles import Tiles
from maverick_jax.ops.triton import inside, load, store

AT_ONCE = 16  # tiles of a program


@functools.partial(jax.jit, static_argnames=("rows", "block", "tiles", "interpret"))
def tiles_gpu(group_sizes_E: jax.Array, rows: int, block: int, tiles: int, *, interpret: bool) -> Tiles:
    """As `Tiles.of`. `interpret` runs the kernel as ordinary JAX operations, on any platform (for tests)."""
    found = pl.pallas_call(
        functools.partial(_kernel, rows=rows, block=block),
        grid=(pl.cdiv(tiles, AT_ONCE),),
        in_specs=[pl.no_block_spec],
        out_specs=[pl.no_block_spec] * 3,
        out_shape=[jax.ShapeDtypeStruct((tiles,), jnp.int32)] * 3,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(group_sizes_E.astype(jnp.int32))
    return Tiles(*found)


def _kernel(sizes_ref, group_ref, start_ref, end_ref, *, rows: int, block: int):
    """As many tiles as a program has. Sums over groups take the place of looking up."""
    E = sizes_ref.shape[0]
    G = pl.next_power_of_2(E + 1)
    group_G = jnp.arange(G, dtype=jnp.int32)
    size_G = load(sizes_ref.at[group_G], group_G < E)
    until_G = jnp.cumsum(size_G)
    start_G = jnp.minimum(until_G - size_G, rows)
    end_G = jnp.where(group_G < E, jnp.minimum(until_G, rows), rows)
    tiles_G = jnp.where(group_G > E, 0, pl.cdiv(end_G - start_G, block))
    behind_G = jnp.cumsum(tiles_G)
    first = pl.program_id(0) * AT_ONCE
    tile_S = first + jnp.arange(AT_ONCE, dtype=jnp.int32)
    # A tile too many falls to the last group, and begins where that has ended.
    group_S = jnp.minimum((tile_S[:, None] >= behind_G[None, :]).astype(jnp.int32).sum(axis=1), E)

    def of_group(x_G):
        return jnp.where(group_S[:, None] == group_G[None, :], x_G[None, :], 0).sum(axis=1)

    start_S = of_group(start_G) + (tile_S - of_group(behind_G - tiles_G)) * block
    for ref, found_S in ((group_ref, group_S), (start_ref, start_S), (end_ref, of_group(end_G))):
        store(ref.at[pl.ds(first, AT_ONCE)], found_S, inside(first, AT_ONCE, ref.shape[0]))
