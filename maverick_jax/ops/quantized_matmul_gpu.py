"""The grouped matmul by quantized matrices on GPU: a Pallas-Triton kernel that reads four neighbouring columns as one word.

A byte at a time would cost a load per weight, and there are stacks whose bytes, not words, Pallas-Triton fails to count. Of a word each
byte is one of four matrices with a quarter of the columns; of 4 bits, each half of a byte is one with half of the inputs.

In float32, and for gradients, a weight stands for exactly what `quantize` says. Otherwise it is multiplied as a float16, which holds every
stored value, with float32 sums that are scaled afterwards: where the scales are bfloat16, nothing is rounded to that. bfloat16
activations are made float16 by a power of two per row, which loses nothing of weight. Hopper has an instruction for float8 to float16, and
none to bfloat16, and integers are float16's least numbers.

Shape suffixes: R rows, K inputs, N outputs, E experts, G groups of inputs, C columns of a word, P inputs of a byte, W words.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from maverick_jax.ops.quantize import QuantizedArray, Weight, matrix_shape
from maverick_jax.ops.tiles import Block, Grid, most_tiles, rows_of_tile
from maverick_jax.ops.tiles_gpu import tiles_gpu
from maverick_jax.ops.triton import converts_float8, dot, inside, load, store

COLUMNS = 4  # of a word
MOST_SIDE = 128  # of a tile of a matrix, along its inputs
LEAST_FLOAT16 = 2.0**-24
FLOAT8_AS_FLOAT16 = 2.0**8  # what a float8 is, divided by the float16 with its bits
UPPER = 16
LARGEST_EXPONENT = 15  # of an activation as float16: that of the largest float16


def suits(weight_EKN: Weight) -> bool:
    """Whether columns fill words, and any tile of a matrix has one row of scales, as in real models."""
    if not isinstance(weight_EKN, QuantizedArray):
        return True
    (_, K, N), groups = matrix_shape(weight_EKN), weight_EKN.scales.shape[1]
    return N % COLUMNS == 0 and (groups == 1 or K % (MOST_SIDE * groups) == 0)


# Under `jit` the kernel is traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("transposed", "interpret"))
def quantized_matmul_gpu(
    x_RK: jax.Array, weight_EKN: QuantizedArray, group_sizes_E: jax.Array, *, transposed: bool, interpret: bool
) -> jax.Array:
    """As `grouped_matmul`, where `suits` says yes. `transposed` multiplies by the transposed matrices, without making them."""
    (rows, inputs), (experts, *sides) = x_RK.shape, matrix_shape(weight_EKN)
    outputs = sides[not transposed]
    if rows == 0:
        return jnp.zeros((0, outputs), x_RK.dtype)
    form = _Form(weight_EKN.values.dtype, transposed, transposed or x_RK.dtype == jnp.float32, converts_float8())
    block = _block(rows, experts, x_RK.dtype, form)
    grid = Grid.of(most_tiles(rows, experts, block.rows), pl.cdiv(outputs, block.columns), pl.cdiv(inputs, block.inputs))
    tile = pl.BlockSpec((None,), lambda i, _, sweep: (sweep * grid.at_once + i,))
    if form.exact:
        operands = [x_RK.reshape(rows, -1, form.sources).swapaxes(1, 2).reshape(rows, inputs), jnp.ones(rows, jnp.float32)]
    else:
        operands = _as_float16(x_RK, form, interpret)
    words_EKW, scales = _words(weight_EKN.values), weight_EKN.scales.reshape(experts, -1)
    sums = pl.pallas_call(
        functools.partial(_kernel, form=form, block=block, parts=grid.parts, groups=weight_EKN.scales.shape[1]),
        grid=grid.programs,
        in_specs=[tile, tile, tile, *[pl.no_block_spec] * 4],
        out_shape=jax.ShapeDtypeStruct((grid.parts, rows, outputs), x_RK.dtype if grid.parts == 1 else jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=interpret,
    )(*tiles_gpu(group_sizes_E, rows, block.rows, grid.at_once * grid.sweeps, interpret=interpret), *operands, words_EKW, scales)
    return sums[0] if grid.parts == 1 else sums.sum(axis=0).astype(x_RK.dtype)


def _words(values_EKN: jax.Array) -> jax.Array:
    """[E, K / P, N / C] uint32, the first column lowest. XLA:GPU makes no copy for it."""
    return lax.bitcast_convert_type(values_EKN.reshape(*values_EKN.shape[:2], -1, COLUMNS), jnp.uint32)


def _as_float16(x_RK, form, interpret):
    """Rows in float16, and a power of two for each: their products are what was given, but for what meets the upper half of a byte."""
    rows, inputs = x_RK.shape
    return pl.pallas_call(
        functools.partial(_float16_kernel, form=form),
        grid=(rows,),
        in_specs=[pl.BlockSpec((None, inputs), lambda r: (r, 0))],
        out_specs=[pl.BlockSpec((None, inputs), lambda r: (r, 0)), pl.BlockSpec((None,), lambda r: (r,))],
        out_shape=[jax.ShapeDtypeStruct((rows, inputs), jnp.float16), jax.ShapeDtypeStruct((rows,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
    )(x_RK)


def _float16_kernel(x_ref, y_ref, scale_ref, *, form):
    """One row. What meets a matrix of a word comes to lie together."""
    inputs = x_ref.shape[0]
    at = jnp.arange(pl.next_power_of_2(inputs))
    x = load(x_ref.at[at % (inputs // form.packed) * form.packed + at // (inputs // form.packed)], at < inputs).astype(jnp.float32)
    largest = jnp.abs(x).max()
    exponent = (lax.bitcast_convert_type(largest, jnp.int32) >> 23) - 126  # the largest is below this power of two
    shift = jnp.clip(exponent - LARGEST_EXPONENT, -100, 100)  # of what is no number too
    y = x * _power_of_two(-shift)
    store(y_ref.at[at], jnp.where(at >= inputs // form.packed, y / UPPER, y) if form.packed > 1 else y, at < inputs)
    scale_ref[...] = _power_of_two(shift)


def _power_of_two(exponent):
    return lax.bitcast_convert_type(exponent + 127 << 23, jnp.float32)


class _Form(NamedTuple):
    """What a kernel multiplies.

    Attributes:
      values: dtype of the stored values.
      exact: by the weights that are stood for; else by the stored values, in float16.
      converts: by the card's own instruction for float8; else its bits are put where those of a float16 are.
    """

    values: DTypeLike
    transposed: bool
    exact: bool
    converts: bool = True

    @property
    def packed(self) -> int:
        """Inputs of a byte."""
        return 2 if self.values == jnp.uint8 else 1

    @property
    def sources(self) -> int:
        """Into how many parts the rows are cut: one for each matrix of a word that they meet."""
        return COLUMNS if self.transposed else self.packed

    @property
    def unit(self) -> float:
        """What a stored value is, divided by what `matrices` gives."""
        if self.values == jnp.float8_e4m3fn:
            return 1.0 if self.converts else FLOAT8_AS_FLOAT16
        return 1 / LEAST_FLOAT16

    def matrices(self, words):
        """[P][C] matrices of words, in float16: the stored values, integers in units of the least float16.

        The upper half of a byte is taken where it lies, as `UPPER` times its value.
        """
        if self.values == jnp.float8_e4m3fn:
            return [[self._float8(words >> 8 * c) for c in range(COLUMNS)]]
        bits = 8 // self.packed
        zero = 1 << bits - 1
        words ^= jnp.uint32(sum(zero << at for at in range(0, 32, bits)))  # integers from 0 on, and what was 0 is `zero`

        def matrix(p, c):
            held = (words >> 8 * c) & ((1 << bits) - 1 << bits * p)
            return lax.bitcast_convert_type(held.astype(jnp.uint16), jnp.float16) - jnp.float16(LEAST_FLOAT16 * (zero << bits * p))

        return [[matrix(p, c) for c in range(COLUMNS)] for p in range(self.packed)]

    def _float8(self, words):
        """The lowest byte of each, in float16."""
        if self.converts:
            return lax.bitcast_convert_type(words.astype(jnp.uint8), self.values).astype(jnp.float16)
        bits = (words << 8 & 0x8000) | (words << 7 & 0x3F80)  # a sign, and seven bits of exponent and mantissa
        return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16)


def _block(rows: int, experts: int, dtype: DTypeLike, form: _Form) -> Block:
    tile = rows_of_tile(rows, experts)
    if form.exact:
        return Block(min(tile, 64), 64, 64, 4, 3) if dtype == jnp.float32 else Block(tile, 64, 128, 4, 3)
    # 256 columns by 64 bytes: with few rows no other size was as fast on an H200 for float8. What registers hold sets the others.
    return Block(tile, 128 if tile * form.packed > 128 else 256, 64 * form.packed, 4 if tile == 16 else 8, 3)


def _kernel(
    group_ref,
    start_ref,
    end_ref,
    x_ref,
    row_scale_ref,
    words_ref,
    scales_ref,
    y_ref,
    *,
    form: _Form,
    block: Block,
    parts: int,
    groups: int,
):
    """A tile of rows times some columns, summed over a part of the inputs."""
    group, start, end = group_ref[...], start_ref[...], end_ref[...]
    inputs, outputs, per_source = x_ref.shape[1], y_ref.shape[2], x_ref.shape[1] // form.sources
    block_column, part = pl.program_id(1) // parts, pl.program_id(1) % parts
    row_slice, rows_inside = pl.ds(start, block.rows), start + jnp.arange(block.rows) < end
    targets = form.packed if form.transposed else COLUMNS
    per_group, N = words_ref.shape[1] * form.packed // groups, words_ref.shape[2] * COLUMNS

    def scale_of(k, words, c):
        """[1, W] of some words' column c, for the group of input k."""
        at = k // per_group * N + (words.start + jnp.arange(words.size)) * COLUMNS + c
        return load(scales_ref.at[group, at], _within(words, words_ref.shape[2])).astype(jnp.float32)[None, :] * form.unit

    def step(i, sums):
        some = _slice(i, block.inputs, form.sources)
        x = [
            load(x_ref.at[row_slice, pl.ds(s * per_source + some.start, some.size)], rows_inside, _within(some, per_source))
            for s in range(form.sources)
        ]
        sides = (i, block.inputs), (block_column, block.columns)
        k, n = sides[::-1] if form.transposed else sides
        bytes_at, words_at = _slice(*k, form.packed), _slice(*n, COLUMNS)
        of_matrix = _within(bytes_at, words_ref.shape[1]), _within(words_at, words_ref.shape[2])
        matrices = form.matrices(load(words_ref.at[group, bytes_at, words_at], *of_matrix))
        found = [jnp.zeros_like(sums[0])] * targets
        for p, c in itertools.product(range(form.packed), range(COLUMNS)):
            matrix = matrices[p][c]
            if form.exact:
                stands_for = matrix.astype(jnp.float32) / UPPER**p * scale_of(k[0] * k[1], words_at, c)
                matrix = stands_for.astype(scales_ref.dtype).astype(x_ref.dtype)
            source, target, axes = (c, p, (1, 1)) if form.transposed else (p, c, (1, 0))
            found[target] += dot(x[source], matrix, axes)
        if groups > 1 and not form.exact:
            found = [y * scale_of(k[0] * k[1], words_at, c) for c, y in enumerate(found)]
        return tuple(a + b for a, b in zip(sums, found, strict=True))

    steps = pl.cdiv(inputs, block.inputs) // parts
    first = part * steps
    last = jnp.where(group < words_ref.shape[0], first + steps, first)  # nothing is read for rows without a group
    nothing = jnp.zeros((block.rows, block.columns // targets), jnp.float32)
    sums = lax.fori_loop(first, last, step, (nothing,) * targets)
    if groups == 1 and not form.exact:
        sums = [y * scale_of(0, _slice(block_column, block.columns, COLUMNS), c) for c, y in enumerate(sums)]
    y = _interleaved(sums)
    if not form.exact:
        y *= load(row_scale_ref.at[row_slice], rows_inside)[:, None]
    columns = _slice(block_column, block.columns, 1)
    store(y_ref.at[part, row_slice, columns], y, rows_inside, _within(columns, outputs))


def _slice(index, size: int, by: int) -> pl.Slice:
    """Block `index` of blocks of `size`, in units of `by`; as a product, of which the compiler sees what divides it."""
    return pl.Slice(index * (size // by), size // by)


def _within(some, total: int):
    return inside(some.start, some.size, total)


def _interleaved(sums):
    """[R, W] for each of 1, 2 or 4 columns of a word -> [R, all of them]."""
    if len(sums) == 1:
        return sums[0]
    half = len(sums) // 2
    pair = [_interleaved(sums[at::2]) for at in range(2)] if half > 1 else sums
    joined = jnp.concatenate([x[:, :, None] for x in pair], axis=2)
    return joined.reshape(joined.shape[0], -1)
