"""Rows sorted by expert, each multiplied by its own expert's matrix.

Backends: CPU loops over the experts that have rows, and over blocks of their rows, or over few rows; NVIDIA GPUs have kernels of their own
(`grouped_matmul_gpu`, `quantized_matmul_gpu`); elsewhere `lax.ragged_dot`, and for quantized matrices a kernel (`grouped_matmul_tpu`).
On CPU and GPU `ragged_dot` multiplies every row by every expert: at 128 experts that is 700 times the work of a gather for one row on CPU.

Shape suffixes: R rows, K inputs, N outputs, E experts.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maverick_jax.ops.linear import LEAST_BFLOAT16_ROWS, AdaptedWeight, LowRankArray, own_ranks
from maverick_jax.ops.product import precision, product
from maverick_jax.ops.quantize import FLOAT8, FORMATS, QuantizedArray, dequantize, matrix_shape
from maverick_jax.ops.toolkit import on_hopper

FEWEST_ROWS = 8
TILE = 128  # sides of a matrix that Hopper takes in float8 are multiples of it
SHARED = 2  # experts per row on CPU: where there are as many, few rows share one
INPUTS_AT_ONCE, BYTES_AT_ONCE = 16, 1 << 19  # of a matrix in a sum on CPU


def grouped_matmul(x_RK: jax.Array, weight_EKN: AdaptedWeight, group_sizes_E: jax.Array) -> jax.Array:
    """Row r of x times the matrix of its group.

    Args:
      x_RK: rows sorted by group.
      weight_EKN: one matrix per group, in x's dtype or quantized. A quantized one has no gradient of its own. With `float8_rows` x is
        rounded to float8 first, each row by its largest magnitude. Of an adapted one the thin matrices are multiplied one after the other.
      group_sizes_E: int32 rows per group; rows beyond their sum belong to no group.

    Returns:
      [R, N] in x's dtype, zero for the rows that belong to no group.
    """
    if isinstance(weight_EKN, LowRankArray):
        thin_Rr = own_ranks(grouped_matmul(x_RK, weight_EKN.a.astype(x_RK.dtype), group_sizes_E), weight_EKN)
        learned_RN = grouped_matmul(thin_Rr, weight_EKN.b.astype(x_RK.dtype), group_sizes_E)
        return grouped_matmul(x_RK, weight_EKN.base, group_sizes_E) + weight_EKN.scale * learned_RN
    if isinstance(weight_EKN, QuantizedArray) and weight_EKN.float8_rows:
        return _by_float8_rows(x_RK, weight_EKN, group_sizes_E)
    branches = {"cpu": _grouped_matmul_cpu, "cuda": _grouped_matmul_cuda, "tpu": _grouped_matmul_tpu, "default": _ragged_dot}
    return lax.platform_dependent(x_RK, weight_EKN, group_sizes_E, **branches)


def _by_float8_rows(x_RK, weight_EKN, group_sizes_E):
    """W8A8, as the released FP8 checkpoint says of itself (spec section 5.2): a scale per row, and products of float8."""
    x_RK, dtype = x_RK.astype(jnp.float32), x_RK.dtype
    largest_R1 = jnp.abs(x_RK).max(axis=1, initial=0, keepdims=True)
    scale_R1 = jnp.maximum(largest_R1 / FORMATS["fp8"].largest, jnp.finfo(jnp.float32).tiny)
    rows_RK, weight_EKN = (x_RK / scale_R1).astype(FLOAT8), dataclasses.replace(weight_EKN, float8_rows=False)
    as_floats = functools.partial(_float8_as_floats, dtype=dtype)
    on_gpu = functools.partial(_float8_cuda, dtype=dtype)
    y_RN = lax.platform_dependent(rows_RK, weight_EKN, group_sizes_E, cuda=on_gpu, default=as_floats)
    return (y_RN * scale_R1).astype(dtype)


def _float8_as_floats(rows_RK, weight_EKN, group_sizes_E, dtype):
    """Every float holds a float8: the same products."""
    return grouped_matmul(rows_RK.astype(dtype), weight_EKN, group_sizes_E).astype(jnp.float32)


def _float8_cuda(rows_RK, weight_EKN, group_sizes_E, dtype):
    if not (on_hopper() and takes_float8_rows(weight_EKN) and len(rows_RK)):
        return _float8_as_floats(rows_RK, weight_EKN, group_sizes_E, dtype)
    from maverick_jax.ops.grouped_matmul_hopper import product

    # Tensor cores want the inputs of both together: so the values lie, if `lay_for_float8_rows` has laid them, and nothing is moved here.
    sums_RN = product(rows_RK, weight_EKN.values.swapaxes(1, 2), group_sizes_E, transposed=True)
    expert_R = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(len(rows_RK)), side="right", method="compare_all")
    return sums_RN.astype(jnp.float32) * weight_EKN.scales[:, 0].astype(jnp.float32).at[expert_R].get(mode="clip")


def takes_float8_rows(weight_EKN: QuantizedArray) -> bool:
    """Whether Hopper multiplies by it in float8: one scale per output channel, and sides that fill tiles."""
    (_, K, N), groups = matrix_shape(weight_EKN), weight_EKN.scales.shape[1]
    return weight_EKN.values.dtype == FLOAT8 and groups == 1 and K % TILE == 0 and N % TILE == 0


def _ragged_dot(x_RK, weight_EKN, group_sizes_E):
    rows = x_RK.shape[0]
    # The TPU compiler has a kernel that skips empty groups, but multiplies a handful of rows by every matrix.
    padded = jnp.pad(x_RK, ((0, max(0, FEWEST_ROWS - rows)), (0, 0)))
    weight_EKN = _dequantized(weight_EKN, x_RK.dtype)
    exact = precision(x_RK.dtype)
    y_RN = lax.ragged_dot(padded, weight_EKN, group_sizes_E, precision=exact, preferred_element_type=jnp.float32)
    return y_RN.astype(x_RK.dtype)[:rows]


@jax.custom_vjp
def _ragged_dot_tpu(x_RK, weight_EKN, group_sizes_E):
    """With gradients of our own, in bfloat16."""
    return _ragged_dot(x_RK, weight_EKN, group_sizes_E)


def _ragged_dot_forward(x_RK, weight_EKN, group_sizes_E):
    return _ragged_dot(x_RK, weight_EKN, group_sizes_E), (x_RK, weight_EKN, group_sizes_E)


def _ragged_dot_backward(residuals, dy_RN):
    """The compiler's own gradient of the matrices multiplies all rows for every expert, and that of the rows takes float32 for dy."""
    from maverick_jax.ops.grouped_matmul_tpu import outer_products_tpu

    x_RK, weight_EKN, group_sizes_E = residuals
    inputs = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
    dx_RK = lax.ragged_dot_general(
        dy_RN, weight_EKN, group_sizes_E, inputs, precision=precision(dy_RN.dtype), preferred_element_type=jnp.float32
    )
    return dx_RK.astype(x_RK.dtype), outer_products_tpu(x_RK, dy_RN, group_sizes_E), None


_ragged_dot_tpu.defvjp(_ragged_dot_forward, _ragged_dot_backward)


# Importing Pallas takes a while, and much that imports this module never multiplies anything.
def _grouped_matmul_tpu(x_RK, weight_EKN, group_sizes_E):
    if not isinstance(weight_EKN, QuantizedArray):
        return (_ragged_dot_tpu if x_RK.dtype == jnp.bfloat16 else _ragged_dot)(x_RK, weight_EKN, group_sizes_E)
    from maverick_jax.ops.grouped_matmul_tpu import grouped_matmul_tpu, suits

    return (grouped_matmul_tpu if suits(weight_EKN) else _ragged_dot)(x_RK, weight_EKN, group_sizes_E)


def _grouped_matmul_cuda(x_RK, weight_EKN, group_sizes_E):
    from maverick_jax.ops.grouped_matmul_gpu import DTYPES, grouped_matmul_gpu
    from maverick_jax.ops.quantized_matmul_gpu import suits

    if x_RK.dtype.name not in DTYPES:
        return _ragged_dot(x_RK, weight_EKN, group_sizes_E)
    return grouped_matmul_gpu(x_RK, weight_EKN if suits(weight_EKN) else _dequantized(weight_EKN, x_RK.dtype), group_sizes_E)


def _dequantized(weight, dtype):
    """A stack or one matrix in the dtype of the activations, if it is not already."""
    return dequantize(weight, lead=len(matrix_shape(weight)) - 2, dtype=dtype) if isinstance(weight, QuantizedArray) else weight


@jax.custom_vjp
def _grouped_matmul_cpu(x_RK, weight_EKN, group_sizes_E):
    if x_RK.dtype == jnp.float32 and isinstance(weight_EKN, jax.Array) and len(x_RK) <= len(group_sizes_E) // SHARED:
        return _row_by_row(x_RK, weight_EKN, group_sizes_E)
    return _product(x_RK, weight_EKN, group_sizes_E, contract_axis=0)


def _forward(x_RK, weight_EKN, group_sizes_E):
    return _grouped_matmul_cpu(x_RK, weight_EKN, group_sizes_E), (x_RK, weight_EKN, group_sizes_E)


def _backward(residuals, dy_RN):
    x_RK, weight_EKN, group_sizes_E = residuals
    dx_RK = _product(dy_RN, weight_EKN, group_sizes_E, contract_axis=1)
    if isinstance(weight_EKN, QuantizedArray):
        return dx_RK, None, None
    return dx_RK, _outer_products(x_RK, dy_RN, weight_EKN, group_sizes_E), None


_grouped_matmul_cpu.defvjp(_forward, _backward)


def _row_by_row(x_RK, weight_EKN, group_sizes_E):
    """Few float32 rows, mostly of different experts: XLA:CPU reads a matrix where it lies for a sum, and copies it for a product.

    The sums are of some parts (P) of the inputs at once: as many bytes as XLA:CPU wants to read by two threads.
    """
    (rows, inputs), outputs = x_RK.shape, weight_EKN.shape[2]
    at_once = math.gcd(inputs, INPUTS_AT_ONCE)
    parts = math.gcd(inputs // at_once, max(1, BYTES_AT_ONCE // (4 * at_once * outputs)))
    weight_EPKN = weight_EKN.reshape(-1, parts, inputs // parts, outputs)
    until_E = jnp.cumsum(group_sizes_E)
    # With a single row XLA would move what reads the matrix out of the loop.
    padded = jnp.pad(x_RK, ((0, 1), (0, 0))).reshape(rows + 1, parts, inputs // parts)
    expert_R = jnp.searchsorted(until_E, jnp.arange(rows + 1), side="right")

    def row(r, out_RN):
        x_PK, expert = padded[r], expert_R[r]

        def add(i, sum_PN):
            for at in range(at_once):
                k = i * at_once + at
                weight_PN = lax.dynamic_slice(weight_EPKN, (expert, 0, k, 0), (1, parts, 1, outputs)).reshape(parts, outputs)
                sum_PN += lax.dynamic_slice_in_dim(x_PK, k, 1, axis=1) * weight_PN
            return sum_PN

        sum_PN = lax.fori_loop(0, inputs // parts // at_once, add, jnp.zeros((parts, outputs), x_RK.dtype))
        return lax.dynamic_update_index_in_dim(out_RN, sum_PN.sum(axis=0), r, axis=0)

    return lax.fori_loop(0, until_E[-1], row, jnp.zeros((rows + 1, outputs), x_RK.dtype))[:rows]


def _product(x_RK, weight_EKN, group_sizes_E, *, contract_axis):
    """Every row times its expert's matrix. `contract_axis` 1 multiplies by the transposed matrices, without making them."""
    rows, (experts, *sides) = x_RK.shape[0], matrix_shape(weight_EKN)
    block = _block_rows(rows, experts, x_RK.dtype)
    groups = _Groups.of(group_sizes_E, block)
    padded = jnp.pad(x_RK, ((0, block), (0, 0)))

    def per_expert(i, out):
        expert = groups.order_E[i]
        # XLA:CPU copies the slice, at the cost of two products of four rows: once per expert, not once per block.
        matrix = _dequantized(_matrix_of(weight_EKN, expert, groups.blocks_E[expert] > 0), x_RK.dtype)

        def per_block(j, out):
            start = groups.start_E[expert] + j * block
            x = lax.dynamic_slice_in_dim(padded, start, block)
            y = product(x, matrix, ((1,), (contract_axis,)))
            # Blocks come in order, so what a block writes past its group's end is overwritten by the next.
            return lax.dynamic_update_slice_in_dim(out, y, start, axis=0)

        return lax.fori_loop(0, groups.blocks_E[expert], per_block, out)

    out = jnp.zeros((rows + block, sides[1 - contract_axis]), jnp.float32)
    out = lax.fori_loop(0, groups.occupied, per_expert, out)
    return jnp.where((jnp.arange(rows) < group_sizes_E.sum())[:, None], out[:rows], 0).astype(x_RK.dtype)


def _matrix_of(weight_EKN, expert, wanted):
    """One expert's matrix out of the stack, read in a branch that is always taken (`wanted`).

    Up to jax 0.10 XLA:CPU slices narrow floats by way of float32 and, where it may, widens the whole stack once, before the loop.
    Out of a branch it moves nothing.
    """

    def read():
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, expert, keepdims=False), weight_EKN)

    return lax.cond(wanted, read, lambda: jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), weight_EKN))


def _outer_products(x_RK, dy_RN, weight_EKN, group_sizes_E):
    """[E, K, N] gradient of the stack: per expert the sum of x^T dy over its rows, in the stack's dtype.

    Narrow floats are put in place as integers: up to jax 0.10 XLA:CPU would widen and round the whole stack for each expert.
    """
    rows, experts = x_RK.shape[0], weight_EKN.shape[0]
    block = _block_rows(rows, experts, x_RK.dtype)
    groups = _Groups.of(group_sizes_E, block)
    x_padded, dy_padded = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_RK, dy_RN))
    dtype = weight_EKN.dtype
    stored = jnp.uint16 if dtype.itemsize == 2 else dtype

    def per_expert(i, stack):
        expert = groups.order_E[i]

        def per_block(j, total):
            start = groups.start_E[expert] + j * block
            inside = jnp.arange(block) + j * block < group_sizes_E[expert]
            x = jnp.where(inside[:, None], lax.dynamic_slice_in_dim(x_padded, start, block), 0)
            dy = lax.dynamic_slice_in_dim(dy_padded, start, block)
            return total + product(x, dy, ((0,), (0,)))

        total = lax.fori_loop(0, groups.blocks_E[expert], per_block, jnp.zeros(weight_EKN.shape[1:], jnp.float32))
        return lax.dynamic_update_index_in_dim(stack, lax.bitcast_convert_type(total.astype(dtype), stored), expert, axis=0)

    stack = lax.fori_loop(0, groups.occupied, per_expert, jnp.zeros(weight_EKN.shape, stored))
    return lax.bitcast_convert_type(stack, dtype)


class _Groups(NamedTuple):
    """The experts that have rows.

    Attributes:
      occupied: how many there are.
      order_E: those experts in ascending order, then the others.
      start_E: first row of every expert.
      blocks_E: blocks of rows of every expert.
    """

    occupied: jax.Array
    order_E: jax.Array
    start_E: jax.Array
    blocks_E: jax.Array

    @classmethod
    def of(cls, group_sizes_E: jax.Array, block: int) -> "_Groups":
        empty_E = group_sizes_E == 0
        start_E = jnp.cumsum(group_sizes_E) - group_sizes_E
        return cls((~empty_E).sum(), jnp.argsort(empty_E, stable=True), start_E, -(-group_sizes_E // block))


def _block_rows(rows: int, experts: int, dtype: jnp.dtype) -> int:
    """Rows per product: about the mean group, so that few rows are padding; in bfloat16, where rows cost less and a product more
    (`linear`), about twice the mean.
    """
    mean = 1 << (rows // experts).bit_length() >> 1
    return min(64, max(LEAST_BFLOAT16_ROWS, 2 * mean) if dtype == jnp.bfloat16 else max(1, mean))
