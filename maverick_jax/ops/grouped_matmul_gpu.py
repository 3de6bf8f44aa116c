"""The grouped matmul on GPU: two Pallas-Triton kernels that read the matrices of the groups that have rows, and no others.

`lax.ragged_dot` on GPU multiplies every row by every matrix. Here a program multiplies one tile of rows, all of one group (`tiles`),
by some columns of its matrix; a matrix is read once per tile of its group. Rows without a group give zero. Quantized matrices are
read as they are stored and dequantized in the kernel; where Pallas-Triton could not count their bytes, two at a time.

Shape suffixes: R rows, K inputs, N outputs, E experts, G groups (the experts, and the rows without one), P parts of the inputs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from maverick_jax.ops.product import product
from maverick_jax.ops.quantize import QuantizedArray, Weight, matrix_shape
from maverick_jax.ops.tiles import Tiles, bounds, most_tiles
from maverick_jax.ops.triton import is_counted

DTYPES = ("bfloat16", "float16", "float32")
TILES_AT_ONCE = 8  # sweep the columns together: tiles of one group share its matrix in the L2 cache, and all columns share the rows
PROGRAMS = 256  # keep the memory of a large GPU busy; fewer are given parts of the sums
MOST_PARTS = 8
MOST_SIDE = 128  # of a tile of a matrix


def suits(weight_EKN: Weight) -> bool:
    """Whether any tile of a matrix has one row of scales, as in real models, and offsets reach the whole stack."""
    if not isinstance(weight_EKN, QuantizedArray):
        return True
    values_EKN, groups = weight_EKN.values, weight_EKN.scales.shape[1]
    return (groups == 1 or matrix_shape(weight_EKN)[1] % (MOST_SIDE * groups) == 0) and (is_counted(values_EKN) or in_pairs(values_EKN))


def in_pairs(values_EKN: jax.Array) -> bool:
    """Whether the kernel takes two neighbouring columns for one element, because it could not index all of them."""
    return not is_counted(values_EKN) and values_EKN.shape[2] % 2 == 0


def _countable(values_EKN: jax.Array) -> jax.Array:
    """A stack that the kernel can index. XLA:GPU makes no copy for it."""
    if not in_pairs(values_EKN):
        return values_EKN
    E, K, N = values_EKN.shape
    return lax.bitcast_convert_type(values_EKN.reshape(E, K, N // 2, 2), jnp.uint16)


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
    return dx_RK, _outer_products(x_RK, dy_RN, group_sizes_E, interpret=interpret), None


grouped_matmul_gpu.defvjp(_forward, _backward)


# Under `jit` the kernel is traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("transposed", "interpret"))
def _product(x_RK, weight_EKN, group_sizes_E, *, transposed: bool, interpret: bool):
    """Every row times its group's matrix. `transposed` multiplies by the transposed matrices, without making them."""
    (rows, inputs), (experts, *sides) = x_RK.shape, matrix_shape(weight_EKN)
    outputs = sides[not transposed]
    if rows == 0:
        return jnp.zeros((0, outputs), x_RK.dtype)
    block = _Block.of(rows, experts, x_RK.dtype)
    most = most_tiles(rows, experts, block.rows)
    at_once = min(TILES_AT_ONCE, most)
    sweeps, columns, steps = pl.cdiv(most, at_once), pl.cdiv(outputs, block.columns), pl.cdiv(inputs, block.inputs)
    wanted = min(MOST_PARTS, pl.cdiv(PROGRAMS, most * columns))
    parts = max(p for p in range(1, wanted + 1) if steps % p == 0)
    stored, narrow = [weight_EKN], None
    if isinstance(weight_EKN, QuantizedArray):
        stored, narrow = [_countable(weight_EKN.values), weight_EKN.scales], weight_EKN.values.dtype
    tile = pl.BlockSpec((None,), lambda i, _, sweep: (sweep * at_once + i,))
    y_PRN = pl.pallas_call(
        functools.partial(_product_kernel, block=block, parts=parts, transposed=transposed, narrow=narrow),
        grid=(at_once, columns * parts, sweeps),  # the first axis runs fastest
        in_specs=[tile, tile, tile, pl.no_block_spec, *[pl.no_block_spec] * len(stored)],
        out_shape=jax.ShapeDtypeStruct((parts, rows, outputs), x_RK.dtype if parts == 1 else jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=interpret,
    )(*Tiles.of(group_sizes_E, rows, block.rows, at_once * sweeps), x_RK, *stored)
    return y_PRN[0] if parts == 1 else y_PRN.sum(axis=0).astype(x_RK.dtype)


def _product_kernel(group_ref, start_ref, end_ref, x_ref, *refs, block: "_Block", parts: int, transposed: bool, narrow: jnp.dtype | None):
    """A tile of rows times some columns, summed over a part of the inputs; `narrow` is the dtype of quantized values."""
    *weight_refs, y_ref = refs
    experts, inputs, outputs = weight_refs[0].shape[0], x_ref.shape[1], y_ref.shape[2]
    group, start, end = group_ref[...], start_ref[...], end_ref[...]
    column, part = pl.program_id(1) // parts * block.columns, pl.program_id(1) % parts
    row_slice, column_slice = pl.ds(start, block.rows), pl.ds(column, block.columns)
    rows_inside, columns_inside = start + jnp.arange(block.rows) < end, _inside(column, block.columns, outputs)

    def step(i, sums):
        input_slice, inputs_inside = pl.ds(i * block.inputs, block.inputs), _inside(i * block.inputs, block.inputs, inputs)
        x = _load(x_ref.at[row_slice, input_slice], rows_inside, inputs_inside)
        k, n = (input_slice, inputs_inside), (column_slice, columns_inside)
        if transposed:
            return sums + _dot(x, _load_matrix(weight_refs, group, n, k, x.dtype, narrow), (1, 1))
        return sums + _dot(x, _load_matrix(weight_refs, group, k, n, x.dtype, narrow), (1, 0))

    steps = pl.cdiv(inputs, block.inputs) // parts
    first = part * steps
    last = jnp.where(group < experts, first + steps, first)  # nothing is read for rows without a group
    sums = lax.fori_loop(first, last, step, jnp.zeros((block.rows, block.columns), jnp.float32))
    _store(y_ref.at[part, row_slice, column_slice], sums, rows_inside, columns_inside)


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
    k_inside, n_inside = _inside(k, side, x_ref.shape[1]), _inside(n, side, dy_ref.shape[1])

    def step(i, sums):
        first = start + i * depth
        row_slice, rows_inside = pl.ds(first, depth), first + jnp.arange(depth) < end
        x, dy = _load(x_ref.at[row_slice, k_slice], rows_inside, k_inside), _load(dy_ref.at[row_slice, n_slice], rows_inside, n_inside)
        return sums + _dot(x, dy, (0, 0))

    sums = lax.fori_loop(0, pl.cdiv(end - start, depth), step, jnp.zeros((side, side), jnp.float32))
    _store(dw_ref.at[pl.program_id(2), k_slice, n_slice], sums, k_inside, n_inside)


class _Block(NamedTuple):
    """What a program multiplies at a time. Sizes chosen for Hopper: they compile there without spilling registers, none was timed."""

    rows: int
    columns: int
    inputs: int
    warps: int
    stages: int

    @classmethod
    def of(cls, rows: int, experts: int, dtype: jnp.dtype) -> "_Block":
        tile = min(128, max(16, pl.next_power_of_2(pl.cdiv(rows, experts))))  # 16: what a tensor core takes at least
        if dtype == jnp.float32:
            return cls(min(tile, 64), 64, 32, 4, 3)
        # With few rows the time is that of reading the matrices.
        return cls(tile, 64, 128, 4, 4) if tile <= 32 else cls(tile, 128, 64, tile // 16, 4)


def _dot(a, b, axes: tuple[int, int]):
    return product(a, b, ((axes[0],), (axes[1],)))


def _inside(first, size: int, total: int):
    """Which of the `size` indices from `first` on are below `total`; None if that is always all."""
    return first + jnp.arange(size) < total if total % size else None


def _mask(shape, first_axis, second_axis):
    axes = [None if first_axis is None else first_axis[:, None], None if second_axis is None else second_axis[None, :]]
    masks = [jnp.broadcast_to(mask, shape) for mask in axes if mask is not None]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _load(ref, *inside):
    mask = _mask(ref.shape, *inside)
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def _load_matrix(refs, group, k, n, dtype, narrow):
    """A tile of a group's matrix; `k` and `n` are slices, each with what of it is inside."""
    (k_slice, k_inside), (n_slice, n_inside) = k, n
    if narrow is None:
        return _load(refs[0].at[group, k_slice, n_slice], k_inside, n_inside)
    values_ref, scales_ref = refs
    size = values_ref.shape[1] // scales_ref.shape[1]  # stored rows of a group
    if narrow == jnp.uint8:
        size, half = 2 * size, k_slice.size // 2
        first = k_slice.start // 2
        byte = _load_bytes(values_ref, group, (pl.ds(first, half), _inside(first, half, values_ref.shape[1])), n, narrow)
        twice = jnp.broadcast_to(byte.astype(jnp.int32)[:, None, :], (half, 2, n_slice.size)).reshape(k_slice.size, n_slice.size)
        values = (((twice >> (jnp.arange(k_slice.size) % 2 * 4)[:, None]) & 15) ^ 8) - 8
    else:
        values = _load_bytes(values_ref, group, k, n, narrow)
    scales = plgpu.load(scales_ref.at[group, k_slice.start // size, n_slice], mask=n_inside, other=None if n_inside is None else 0)
    return (values.astype(jnp.float32) * scales.astype(jnp.float32)[None, :]).astype(scales.dtype).astype(dtype)


def _load_bytes(ref, group, k, n, dtype):
    """A tile of values of one byte, which may lie in pairs of columns (`_countable`)."""
    (k_slice, k_inside), (n_slice, n_inside) = k, n
    if ref.dtype == dtype:
        return _load(ref.at[group, k_slice, n_slice], k_inside, n_inside)
    first, half = n_slice.start // 2, n_slice.size // 2
    pair = _load(ref.at[group, k_slice, pl.ds(first, half)], k_inside, _inside(first, half, ref.shape[2])).astype(jnp.int32)
    twice = jnp.broadcast_to(pair[:, :, None], (k_slice.size, half, 2)).reshape(k_slice.size, n_slice.size)
    byte = (twice >> (jnp.arange(n_slice.size) % 2 * 8)[None, :]).astype(jnp.uint8)
    return byte if dtype == jnp.uint8 else lax.bitcast_convert_type(byte, dtype)


def _store(ref, value, *inside):
    plgpu.store(ref, value.astype(ref.dtype), mask=_mask(ref.shape, *inside))
