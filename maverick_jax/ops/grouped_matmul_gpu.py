"""The grouped matmul on GPU: Pallas-Triton kernels that read the matrices of the groups that have rows, and no others.

`lax.ragged_dot` on GPU multiplies every row by every matrix. Here a program multiplies one tile of rows, all of one group (`tiles`),
by some columns of its matrix; a matrix is read once per tile of its group. Rows without a group give zero. Quantized matrices have a
kernel of their own (`quantized_matmul_gpu`), and Hopper has others of another toolkit (`grouped_matmul_hopper`), for those who choose it.

Shape suffixes: R rows, K inputs, N outputs, E experts, G groups (the experts, and the rows without one), P parts of the inputs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from maverick_jax.ops.quantize import QuantizedArray, Weight
from maverick_jax.ops.quantized_matmul_gpu import quantized_matmul_gpu
from maverick_jax.ops.tiles import Block, Grid, bounds, most_tiles, rows_of_tile
from maverick_jax.ops.tiles_gpu import tiles_gpu
from maverick_jax.ops.toolkit import wants_mosaic
from maverick_jax.ops.triton import dot, inside, load, store

DTYPES = ("bfloat16", "float16", "float32")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul_gpu(x_RK: jax.Array, weight_EKN: Weight, group_sizes_E: jax.Array, interpret: bool = False) -> jax.Array:
    """As `grouped_matmul`, for x and weight of one of `DTYPES` or a quantized weight that `suits`, with float32 sums.

    Args:
      interpret: run the kernels as ordinary JAX operations, on any platform (for tests).
    """
    return _product(x_RK, weight_EKN, group_sizes_E, transposed=False, interpret=interpret)


def _forward(x_RK, weight_EKN, group_sizes_E, interpret):
    return grouped_matmul_gpu(x_RK, weight_EKN, group_sizes_E, interpret), (x_RK, weight_EKN, group_sizes_E)


def _backward(interpret, residuals, dy_RN):
    x_RK, weight_EKN, group_sizes_E = residuals
    dx_RK = _product(dy_RN, weight_EKN, group_sizes_E, transposed=True, interpret=interpret)
    if isinstance(weight_EKN, QuantizedArray):
        return dx_RK, None, None
    if mosaic := _mosaic(x_RK, weight_EKN, interpret):
        return dx_RK, mosaic.outer_products(x_RK, dy_RN, group_sizes_E), None
    return dx_RK, _outer_products(x_RK, dy_RN, group_sizes_E, interpret=interpret), None


grouped_matmul_gpu.defvjp(_forward, _backward)


def _product(x_RK, weight_EKN, group_sizes_E, *, transposed: bool, interpret: bool):
    """Every row times its group's matrix. `transposed` multiplies by the transposed matrices, without making them."""
    if mosaic := _mosaic(x_RK, weight_EKN, interpret):
        return mosaic.product(x_RK, weight_EKN, group_sizes_E, transposed=transposed)
    form = quantized_matmul_gpu if isinstance(weight_EKN, QuantizedArray) else _dense
    return form(x_RK, weight_EKN, group_sizes_E, transposed=transposed, interpret=interpret)


def _mosaic(x_RK, weight_EKN, interpret: bool):
    """The other toolkit's kernels, if they are chosen and suit; imported only then."""
    if interpret or len(x_RK) == 0 or not wants_mosaic():
        return None
    from maverick_jax.ops import grouped_matmul_hopper

    return grouped_matmul_hopper if grouped_matmul_hopper.suits(x_RK, weight_EKN) else None


# Under `jit` the kernel is traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("transposed", "interpret"))
def _dense(x_RK, weight_EKN, group_sizes_E, *, transposed: bool, interpret: bool):
    (rows, inputs), (experts, *sides) = x_RK.shape, weight_EKN.shape
    outputs = sides[not transposed]
    if rows == 0:
        return jnp.zeros((0, outputs), x_RK.dtype)
    block = _block(rows, experts, x_RK.dtype)
    grid = Grid.of(most_tiles(rows, experts, block.rows), pl.cdiv(outputs, block.columns), pl.cdiv(inputs, block.inputs))
    tile = pl.BlockSpec((None,), lambda i, _, sweep: (sweep * grid.at_once + i,))
    y_PRN = pl.pallas_call(
        functools.partial(_dense_kernel, block=block, parts=grid.parts, transposed=transposed),
        grid=grid.programs,
        in_specs=[tile, tile, tile, pl.no_block_spec, pl.no_block_spec],
        out_shape=jax.ShapeDtypeStruct((grid.parts, rows, outputs), x_RK.dtype if grid.parts == 1 else jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=interpret,
    )(*tiles_gpu(group_sizes_E, rows, block.rows, grid.at_once * grid.sweeps, interpret=interpret), x_RK, weight_EKN)
    return y_PRN[0] if grid.parts == 1 else y_PRN.sum(axis=0).astype(x_RK.dtype)


def _dense_kernel(group_ref, start_ref, end_ref, x_ref, weight_ref, y_ref, *, block: Block, parts: int, transposed: bool):
    """A tile of rows times some columns, summed over a part of the inputs."""
    inputs, outputs = x_ref.shape[1], y_ref.shape[2]
    group, start, end = group_ref[...], start_ref[...], end_ref[...]
    column, part = pl.program_id(1) // parts * block.columns, pl.program_id(1) % parts
    row_slice, column_slice = pl.ds(start, block.rows), pl.ds(column, block.columns)
    rows_inside, columns_inside = start + jnp.arange(block.rows) < end, inside(column, block.columns, outputs)

    def step(i, sums):
        input_slice, inputs_inside = pl.ds(i * block.inputs, block.inputs), inside(i * block.inputs, block.inputs, inputs)
        x = load(x_ref.at[row_slice, input_slice], rows_inside, inputs_inside)
        if transposed:
            return sums + dot(x, load(weight_ref.at[group, column_slice, input_slice], columns_inside, inputs_inside), (1, 1))
        return sums + dot(x, load(weight_ref.at[group, input_slice, column_slice], inputs_inside, columns_inside))

    steps = pl.cdiv(inputs, block.inputs) // parts
    first = part * steps
    last = jnp.where(group < weight_ref.shape[0], first + steps, first)  # nothing is read for rows without a group
    sums = lax.fori_loop(first, last, step, jnp.zeros((block.rows, block.columns), jnp.float32))
    store(y_ref.at[part, row_slice, column_slice], sums, rows_inside, columns_inside)


@functools.partial(jax.jit, static_argnames="interpret")
def _outer_products(x_RK, dy_RN, group_sizes_E, *, interpret: bool):
    """[E, K, N] gradient of the matrices: per expert the sum of x^T dy over its rows."""
    (rows, inputs), outputs, experts = x_RK.shape, dy_RN.shape[1], group_sizes_E.size
    if rows == 0:
        return jnp.zeros((experts, inputs, outputs), x_RK.dtype)
    side = 64 if x_RK.dtype == jnp.float32 else 128
    start_G, end_G = bounds(group_sizes_E, rows)
    expert = pl.BlockSpec((None,), lambda _, __, e: (e,))
    return pl.pallas_call(
        functools.partial(_outer_products_kernel, side=side, depth=32),
        grid=(pl.cdiv(inputs, side), pl.cdiv(outputs, side), experts),
        in_specs=[expert, expert, pl.no_block_spec, pl.no_block_spec],
        out_shape=jax.ShapeDtypeStruct((experts, inputs, outputs), x_RK.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
    )(start_G[:-1], end_G[:-1], x_RK, dy_RN)


def _outer_products_kernel(start_ref, end_ref, x_ref, dy_ref, dw_ref, *, side: int, depth: int):
    """A square of one expert's gradient; `depth` rows at a time."""
    start, end = start_ref[...], end_ref[...]
    k, n = pl.program_id(0) * side, pl.program_id(1) * side
    k_slice, n_slice = pl.ds(k, side), pl.ds(n, side)
    k_inside, n_inside = inside(k, side, x_ref.shape[1]), inside(n, side, dy_ref.shape[1])

    def step(i, sums):
        first = start + i * depth
        row_slice, rows_inside = pl.ds(first, depth), first + jnp.arange(depth) < end
        x, dy = load(x_ref.at[row_slice, k_slice], rows_inside, k_inside), load(dy_ref.at[row_slice, n_slice], rows_inside, n_inside)
        return sums + dot(x, dy, (0, 0))

    sums = lax.fori_loop(0, pl.cdiv(end - start, depth), step, jnp.zeros((side, side), jnp.float32))
    store(dw_ref.at[pl.program_id(2), k_slice, n_slice], sums, k_inside, n_inside)


def _block(rows: int, experts: int, dtype: DTypeLike) -> Block:
    """Sizes chosen for Hopper: they compile there without spilling registers, none was timed."""
    tile = rows_of_tile(rows, experts)
    if dtype == jnp.float32:
        return Block(min(tile, 64), 64, 32, 4, 3)
    # With few rows the time is that of reading the matrices.
    return Block(tile, 64, 128, 4, 4) if tile <= 32 else Block(tile, 128, 64, tile // 16, 4)
