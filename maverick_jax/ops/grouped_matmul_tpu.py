"""The grouped matmul by quantized matrices on TPU: a Pallas kernel that reads them as they are stored.

For `lax.ragged_dot` XLA:TPU first makes a bfloat16 copy of the whole stack: 1.3 GB of a device's part of Maverick, five times
the traffic. Here matrices come into the chip's memory in 8 or 4 bits, those of groups that have rows and no others, and become
the activations' dtype a few inputs at a time.

Rows are laid out anew so that every group begins at a tile of its own: they are few beside the matrices.

Shape suffixes: R rows, K inputs, N outputs, E experts, S tiles of rows, B rows of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

from maverick_jax.ops.product import product
from maverick_jax.ops.quantize import QuantizedArray, matrix_shape
from maverick_jax.ops.tiles import Tiles, most_tiles

LEAST_ROWS, MOST_ROWS = 16, 256  # of a tile; a bfloat16 register holds 16
AT_ONCE, TRANSPOSED_AT_ONCE = 512, 128  # inputs of a matrix that become the activations' dtype
MATRIX_BYTES = 8 * 2**20  # of a matrix, that a program multiplies by
MOST_COLUMNS = 1024
LANES, SUBLANES = 128, 8
VMEM_BYTES = 64 * 2**20
OUTER_ROWS, LEAST_OUTER_ROWS, OUTER_SIDE = 512, 128, 1024  # of a tile


def suits(weight_EKN: QuantizedArray) -> bool:
    """Whether groups of inputs fill whole registers, as those of real models do."""
    groups = weight_EKN.scales.shape[1]
    return groups == 1 or weight_EKN.values.shape[1] % (32 * groups) == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul_tpu(x_RK: jax.Array, weight_EKN: QuantizedArray, group_sizes_E: jax.Array, interpret: bool = False) -> jax.Array:
    """As `grouped_matmul`, by a quantized weight that `suits`; it has no gradient of its own.

    Args:
      interpret: run the kernels as ordinary JAX operations, on any platform (for tests).
    """
    return _product(x_RK, weight_EKN, group_sizes_E, transposed=False, interpret=interpret)


def _forward(x_RK, weight_EKN, group_sizes_E, interpret):
    return grouped_matmul_tpu(x_RK, weight_EKN, group_sizes_E, interpret), (weight_EKN, group_sizes_E)


def _backward(interpret, residuals, dy_RN):
    return _product(dy_RN, *residuals, transposed=True, interpret=interpret), None, None


grouped_matmul_tpu.defvjp(_forward, _backward)


def outer_products_tpu(x_RK: jax.Array, dy_RN: jax.Array, group_sizes_E: jax.Array, *, interpret: bool = False) -> jax.Array:
    """[E, K, N] gradient of a stack that is not quantized: per expert the sum of x^T dy over its rows, in x's dtype.

    By the kernel that ships with jax: XLA:TPU would multiply all rows, masked, once for every expert of the device.

    Args:
      x_RK, dy_RN: bfloat16: float32 the kernel would multiply as such.
      interpret: run the kernel as ordinary JAX operations, on any platform (for tests).
    """
    (rows, K), N = x_RK.shape, dy_RN.shape[1]
    tile = OUTER_ROWS if rows >= OUTER_ROWS else LEAST_OUTER_ROWS
    x_RK, dy_RN = (jnp.pad(a, ((0, -rows % tile), (0, 0))) for a in (x_RK, dy_RN))
    tiling = (tile, min(OUTER_SIDE, K), min(OUTER_SIDE, N))
    with jax.numpy_dtype_promotion("standard"):  # the kernel counts tiles in booleans
        return tgmm(x_RK.T, dy_RN, group_sizes_E, x_RK.dtype, tiling, interpret=interpret)


# Under `jit` the kernel is traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("transposed", "interpret"))
def _product(x_RK, weight_EKN, group_sizes_E, *, transposed: bool, interpret: bool):
    """Every row times its group's matrix. `transposed` multiplies by the transposed matrices, without making them."""
    (rows, inputs), (experts, K, N) = x_RK.shape, matrix_shape(weight_EKN)
    outputs = K if transposed else N
    if rows == 0:
        return jnp.zeros((0, outputs), x_RK.dtype)
    B = min(MOST_ROWS, max(LEAST_ROWS, pl.next_power_of_2(pl.cdiv(rows, experts))))
    tiles = Tiles.of(group_sizes_E, rows, B, most_tiles(rows, experts, B))
    row_SB = tiles.start_S[:, None] + jnp.arange(B, dtype=jnp.int32)[None, :]
    row_SB = jnp.where((row_SB < tiles.end_S[:, None]) & (tiles.group_S < experts)[:, None], row_SB, rows).reshape(-1)
    place_R = jnp.full((rows,), row_SB.size, jnp.int32).at[row_SB].set(jnp.arange(row_SB.size, dtype=jnp.int32), mode="drop")
    used = (tiles.group_S < experts).sum(dtype=jnp.int32)  # the others come behind them, and none of their blocks is fetched

    def tile(t, used):
        return jnp.minimum(t, jnp.maximum(used[0] - 1, 0))

    def group(t, group, used):
        return jnp.minimum(group[tile(t, used)], experts - 1)

    values, scales = weight_EKN.values, weight_EKN.scales
    groups = scales.shape[1]
    size = K // groups
    if transposed:
        columns = _rows_of_matrix(values.shape[2] * values.dtype.itemsize, K, size)
        stored = [(columns * values.shape[1] // K, N), (max(1, columns // size), N)]
        starts = [lambda o: (o, 0), lambda o: (0 if groups == 1 else o, 0)]
        kernel = functools.partial(_transposed_kernel, size=size, step=_step(size, groups, TRANSPOSED_AT_ONCE))
    else:
        columns = _columns_of_matrix(values.shape[1], N)
        stored = [(values.shape[1], columns), (groups, columns)]
        starts = [lambda o: (0, o)] * 2
        kernel = functools.partial(_kernel, size=size, step=_step(size, groups, AT_ONCE))
    matrix = [
        pl.BlockSpec((None, *block), lambda o, t, g, used, start=start: (group(t, g, used), *start(o)))
        for block, start in zip(stored, starts, strict=True)
    ]
    y_SB = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(outputs, columns), tiles.group_S.size),  # a matrix stays for all tiles of its group
            in_specs=[pl.BlockSpec((B, inputs), lambda o, t, g, used: (tile(t, used), 0)), *matrix],
            out_specs=pl.BlockSpec((B, columns), lambda o, t, g, used: (tile(t, used), o)),
        ),
        out_shape=jax.ShapeDtypeStruct((row_SB.size, outputs), x_RK.dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
    )(tiles.group_S, used[None], x_RK.at[row_SB].get(mode="fill", fill_value=0), values, scales)
    return y_SB.at[place_R].get(mode="fill", fill_value=0)


def _kernel(_, used_ref, x_ref, values_ref, scales_ref, y_ref, *, size: int, step: int):
    """A tile of rows times some columns of its group's matrix; `size` inputs share a scale, `step` are dequantized at once."""

    @pl.when(pl.program_id(1) < used_ref[0])
    def multiply():
        K, dtype = x_ref.shape[1], x_ref.dtype
        # The narrow values are exact in bfloat16, and their one scale per column can wait for the sums. In float32 a weight is
        # what `dequantize` says it is.
        scale_sums = size == K and dtype != jnp.float32
        sums = jnp.zeros(y_ref.shape, jnp.float32)
        for first in range(0, K, step):
            inputs = slice(first, min(first + step, K))
            matrix = _values(values_ref, inputs).astype(dtype) if scale_sums else _weights(values_ref, scales_ref, inputs, size, dtype)
            sums += _dot(x_ref[:, inputs], matrix, 0)
        y_ref[...] = (sums * scales_ref[...].astype(jnp.float32) if scale_sums else sums).astype(dtype)


def _transposed_kernel(_, used_ref, dy_ref, values_ref, scales_ref, dx_ref, *, size: int, step: int):
    """A tile of rows times some rows of its group's matrix."""

    @pl.when(pl.program_id(1) < used_ref[0])
    def multiply():
        for first in range(0, dx_ref.shape[1], step):
            inputs = slice(first, min(first + step, dx_ref.shape[1]))
            dx_ref[:, inputs] = _dot(dy_ref[...], _weights(values_ref, scales_ref, inputs, size, dy_ref.dtype), 1).astype(dx_ref.dtype)


def _dot(x, matrix, contract: int):
    return product(x, matrix, ((1,), (contract,)))


def _values(ref, inputs: slice):
    if ref.dtype != jnp.uint8:
        return ref[inputs, :]
    # A register holds neighbouring inputs in neighbouring bits, as a byte holds its two values.
    return pltpu.bitcast(ref[inputs.start // 2 : inputs.stop // 2, :], jnp.int4)


def _weights(values_ref, scales_ref, inputs: slice, size: int, dtype):
    scales_GN = scales_ref[inputs.start // size : pl.cdiv(inputs.stop, size), :]
    G, N = scales_GN.shape
    product = _values(values_ref, inputs).astype(jnp.float32).reshape(G, -1, N) * scales_GN.astype(jnp.float32)[:, None, :]
    return product.reshape(-1, N).astype(scales_GN.dtype).astype(dtype)


def _columns_of_matrix(stored_rows: int, N: int) -> int:
    """Columns that a program multiplies by: as many as there is room for."""
    most = min(MOST_COLUMNS, MATRIX_BYTES // stored_rows // LANES * LANES)
    return N if most >= N else max(LANES, most)


def _rows_of_matrix(row_bytes: int, K: int, size: int) -> int:
    """Rows that a program multiplies by, transposed: with whole registers of scales, unless one row of them serves all."""
    most = max(LANES, min(MOST_COLUMNS, MATRIX_BYTES // row_bytes // LANES * LANES)) if size == K else SUBLANES * size
    return min(K, most)


def _step(size: int, groups: int, most: int) -> int:
    """Inputs to dequantize at once: a part of a group or whole groups."""
    return most if groups == 1 or size % most == 0 else max(size, most // size * size)
