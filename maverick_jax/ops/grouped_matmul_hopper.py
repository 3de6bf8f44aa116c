"""The grouped matmul on Hopper by Pallas-Mosaic-GPU: the tensor memory accelerator fetches, products of whole warpgroups multiply.

As in `grouped_matmul_gpu` a program multiplies one tile of rows, all of one group (`tiles`), by some columns of its matrix. One
warpgroup fetches what two multiply, half of the columns each. What quantized values stand for is computed in registers, rounded to the
dtype of the rows, and written to shared memory, from where the tensor cores take it.

Shape suffixes: R rows, K inputs, N outputs, E experts, G groups (the experts, and the rows without one).
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from maverick_jax.ops.quantize import QuantizedArray, Weight, matrix_shape
from maverick_jax.ops.tiles import Tiles, bounds, most_tiles, rows_of_tile

DTYPES = ("bfloat16", "float16")
WARPGROUPS = 2  # that multiply; one more fetches
LEAST_ROWS = 64  # of a tile: a product of a warpgroup has as many
DEPTH = 64  # of a step, along the sums, and sides of a piece in registers: with 16 bits the 128 bytes that a swizzle spans
SIDE = 128  # of a square of the gradient, and the least of a tile
STEPS = {1: 4, 2: 3}  # in flight, by the inputs of a stored value: what shared memory holds
BEHIND = 1  # steps whose products may still run when the next is begun: what they read is kept as long
FETCHING = 40  # registers of a thread that fetches
PIECE = plgpu.Layout.WGMMA_UPCAST_2X  # of stored values in registers: four neighbours in a thread
COMPILER = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


class _Form(NamedTuple):
    """What a kernel multiplies by.

    Attributes:
      stored: dtype of the matrices.
      packed: inputs of a stored value.
      per_scale: inputs that share a scale; 0 without scales.
      transposed: the transposed matrices.
      rows, columns: of a tile of results.
    """

    stored: jnp.dtype
    packed: int
    per_scale: int
    transposed: bool
    rows: int
    columns: int

    @classmethod
    def of(cls, weight_EKN: Weight, rows: int, transposed: bool) -> "_Form":
        E, K, N = matrix_shape(weight_EKN)
        values = weight_EKN.values if isinstance(weight_EKN, QuantizedArray) else weight_EKN
        packed = K // values.shape[1]
        columns = 2 * SIDE if (K // packed if transposed else N) % (2 * SIDE) == 0 else SIDE
        per_scale = K // weight_EKN.scales.shape[1] if isinstance(weight_EKN, QuantizedArray) else 0
        return cls(values.dtype, packed, per_scale, transposed, max(LEAST_ROWS, rows_of_tile(rows, E)), columns)

    @property
    def half(self) -> int:
        """Columns of a warpgroup."""
        return self.columns // WARPGROUPS

    @property
    def matrix(self) -> tuple[int, int]:
        """Of a tile of stored values."""
        return (self.columns, DEPTH) if self.transposed else (DEPTH, self.columns)

    @property
    def scales(self) -> tuple[int, int]:
        """Of those that a tile of stored values has."""
        inputs, outputs = self.matrix
        return max(1, inputs * self.packed // self.per_scale), outputs

    def operand(self, ref):
        """A tile, or what it stands for, as a product takes it."""
        return ref.transpose((1, 0)) if self.transposed else ref


def suits(x_RK: jax.Array, weight_EKN: Weight) -> bool:
    """Whether tiles fill the product and its gradients, as in real models."""
    _, K, N = matrix_shape(weight_EKN)
    form = _Form.of(weight_EKN, len(x_RK), transposed=False)
    scaled_alike = form.per_scale in (0, K) or form.per_scale % (DEPTH * form.packed) == 0
    return x_RK.dtype.name in DTYPES and K % (SIDE * form.packed) == 0 and N % SIDE == 0 and scaled_alike


# Under `jit` the kernel is traced and lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("transposed", "interpret"))
def product(x_RK: jax.Array, weight_EKN: Weight, group_sizes_E: jax.Array, *, transposed: bool, interpret: object = None) -> jax.Array:
    """As `grouped_matmul`, where `suits` says yes. `transposed` multiplies by the transposed matrices, without making them.

    Args:
      x_RK: also float8 by float8 matrices that are transposed, whose results are bfloat16 (`grouped_matmul.takes_float8_rows`).
      interpret: jax's `InterpretGPUParams`, to simulate a card (for tests).
    """
    rows, (_, K, N) = len(x_RK), matrix_shape(weight_EKN)
    form = _Form.of(weight_EKN, rows, transposed)
    inputs, outputs = (N, K // form.packed) if transposed else (K // form.packed, N)
    # Of packed values one part of the inputs is multiplied after the other, and each lies together: of x, or of what transposed ones give.
    parts = 1 if transposed else form.packed
    xs = [_at_least(form.rows, x_RK[:, part::parts]) for part in range(parts)]
    blocks = outputs // form.columns * (form.packed // parts)
    tiles = most_tiles(rows, len(group_sizes_E), form.rows)
    dtype = x_RK.dtype if x_RK.dtype.name in DTYPES else jnp.dtype("bfloat16")
    scratch = [plgpu.SMEM((WARPGROUPS, form.rows, DEPTH), dtype, transforms=(_swizzle(dtype),))]
    if form.per_scale:
        wide = (form.half, DEPTH) if transposed else (DEPTH, form.half)
        scratch.append(plgpu.SMEM((WARPGROUPS, *wide), x_RK.dtype, transforms=_tiled(x_RK.dtype)))
    y_RN = plgpu.kernel(
        functools.partial(_product_kernel, form=form, steps=inputs // DEPTH),
        out_type=jax.ShapeDtypeStruct((len(xs[0]), blocks * form.columns), dtype),
        scratch_types=scratch,
        grid=(tiles, blocks),  # the last runs fastest: programs at work together share rows, and some tiles the matrix of their group
        grid_names=("tile", "block"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
        interpret=interpret,
    )(Tiles.of(group_sizes_E, rows, form.rows, tiles), xs, jax.tree.leaves(weight_EKN))[:rows]
    return y_RN.reshape(rows, form.packed, -1).swapaxes(1, 2).reshape(rows, K) if transposed else y_RN


def _product_kernel(tiles, x_refs, matrix_refs, y_ref, out_ref, *wide_ref, form: _Form, steps: int):
    """A tile of rows times some columns.

    Args:
      out_ref: room for results of each warpgroup.
      wide_ref: room of each for what quantized values stand for.
    """
    tile, block, me = (lax.axis_index(name) for name in ("tile", "block", "warpgroup"))
    group, start, end = (ref[tile] for ref in tiles)
    experts, *sides = matrix_refs[0].shape
    count = jnp.clip(end - start, 0, form.rows)
    needed = jnp.where((group < experts) & (count > 0), steps, 0)  # nothing is read for rows without a group
    first = jnp.minimum(start, y_ref.shape[0] - form.rows)  # what is fetched lies within the array
    across = sides[not form.transposed] // form.columns
    part, at = lax.div(block, across), lax.rem(block, across)

    def of_matrix(k):
        return (at, k) if form.transposed else (k, at)

    def of_scales(k):
        inputs, outputs = of_matrix(k)
        return lax.div(inputs * (form.matrix[0] * form.packed), form.scales[0] * form.per_scale), outputs

    def multiply(_, *operands):
        *fetched, sums = operands
        if not form.per_scale:
            x, matrix = fetched
            mine = pl.ds(me * form.half, form.half)
            plgpu.wgmma(sums, x, form.operand(matrix.at[mine] if form.transposed else matrix.at[:, mine]))
            plgpu.wgmma_wait(BEHIND)
            return sums
        *xs, values, scales = fetched
        wide = wide_ref[0].at[me]
        for p, x in [(part, xs[0])] if form.transposed else enumerate(xs):
            _stand_for(wide, values, scales, me, p, form)
            plgpu.commit_smem()
            plgpu.wgmma(sums, x, form.operand(wide))
            plgpu.wgmma_wait(0)
        return sums

    def finish(multiply_all):
        def with_sums(sums):
            multiply_all(sums)
            y = sums[...].astype(y_ref.dtype)
            for column in range(0, form.half, DEPTH):
                columns = pl.ds(block * form.columns + me * form.half + column, DEPTH)
                _write(y[:, column : column + DEPTH], out_ref.at[me], y_ref.at[:, columns], first, start, count)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(with_sums, plgpu.WGMMAAccumulatorRef((form.rows, form.half), jnp.float32))

    spec = functools.partial(plgpu.BlockSpec, delay_release=0 if form.per_scale else BEHIND)
    rows = spec((form.rows, DEPTH), lambda k: (0, k), transforms=_tiled(x_refs[0].dtype))
    matrices = [spec(form.matrix, of_matrix, transforms=_tiled(form.stored))]
    if form.per_scale:
        matrices.append(spec(form.scales, of_scales))
    plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(needed,),
        in_specs=[rows] * len(x_refs) + matrices,
        memory_registers=FETCHING,
        max_concurrent_steps=STEPS[len(x_refs)],
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        compute_context=finish,
    )(*(x.at[pl.ds(first, form.rows)] for x in x_refs), *(m.at[jnp.minimum(group, experts - 1)] for m in matrix_refs))


def _stand_for(wide_ref, values_ref, scales_ref, me, part, form: _Form):
    """Writes what the stored values of a warpgroup's columns stand for; of packed ones, those of one part of the inputs."""
    inputs, outputs = wide_ref.shape
    before_k, before_n = (me * inputs, 0) if form.transposed else (0, me * outputs)
    for k, n in itertools.product(range(0, inputs, DEPTH), range(0, outputs, DEPTH)):
        at_k, at_n = pl.ds(before_k + k, DEPTH), pl.ds(before_n + n, DEPTH)
        values = plgpu.layout_cast(values_ref.at[at_k, at_n][...], PIECE)
        group = lax.div((before_k + k) * form.packed, form.per_scale)
        scale = plgpu.layout_cast(scales_ref.at[group, at_n][...], PIECE.reduce(0)).astype(jnp.float32)
        scale = plgpu.layout_cast(lax.broadcast_in_dim(scale, values.shape, (1,)), PIECE)
        wide_ref.at[pl.ds(k, DEPTH), pl.ds(n, DEPTH)][...] = (_float32(values, part) * scale).astype(wide_ref.dtype)


def _float32(values, part):
    """Stored values; of packed ones those of one part."""
    if values.dtype == jnp.uint8:
        half = lax.shift_right_logical(values.astype(jnp.int32), 4 * part) & 15
        return ((half ^ 8) - 8).astype(jnp.float32)
    return (values.astype(jnp.float16) if values.dtype == jnp.float8_e4m3fn else values).astype(jnp.float32)


def _write(y, through_ref, y_ref, first, start, count):
    """`count` rows from row `start` on. Copies are of sizes known beforehand: there is one for every bit of the count."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of what was written before
    through_ref[...] = y
    plgpu.commit_smem()
    for bit in range(through_ref.shape[0].bit_length()):
        size = 1 << bit

        @pl.when(count & size != 0)
        def _(size=size, before=count & size - 1):
            plgpu.copy_smem_to_gmem(through_ref.at[pl.ds(start - first + before, size)], y_ref.at[pl.ds(start + before, size)])


@functools.partial(jax.jit, static_argnames="interpret")
def outer_products(x_RK: jax.Array, dy_RN: jax.Array, group_sizes_E: jax.Array, *, interpret: object = None) -> jax.Array:
    """[E, K, N] gradient of the matrices: per expert the sum of x^T dy over its rows."""
    (rows, K), N, experts = x_RK.shape, dy_RN.shape[1], group_sizes_E.size
    start_G, end_G = bounds(group_sizes_E, rows)
    return plgpu.kernel(
        _outer_products_kernel,
        out_type=jax.ShapeDtypeStruct((experts, K, N), x_RK.dtype),
        scratch_types=[plgpu.SMEM((SIDE, DEPTH), x_RK.dtype, transforms=_tiled(x_RK.dtype))],
        grid=(experts, K // SIDE, N // SIDE),
        grid_names=("expert", "inputs", "outputs"),
        compiler_params=COMPILER,
        interpret=interpret,
    )(start_G[:-1], end_G[:-1], _at_least(DEPTH, x_RK), _at_least(DEPTH, dy_RN))


def _outer_products_kernel(start_ref, end_ref, x_ref, dy_ref, dw_ref, out_ref):
    """A square of one expert's gradient, `DEPTH` rows at a time."""
    expert, k, n = (lax.axis_index(name) for name in ("expert", "inputs", "outputs"))
    start, end, last = start_ref[expert], end_ref[expert], x_ref.shape[0] - DEPTH

    def add(indices, x, dy, sums):
        first = start + indices[0] * DEPTH
        fetched = jnp.minimum(first, last)  # what is fetched lies within the array

        @pl.when((fetched < first) | (fetched + DEPTH > end))
        def _():
            for ref in (x, dy):  # both: zero times what is no number would be none
                row = fetched + plgpu.broadcasted_iota(jnp.int32, ref.shape, 0, layout=plgpu.Layout.WGMMA)
                ref[...] = jnp.where((row >= first) & (row < end), ref[...], 0)
            plgpu.commit_smem()

        plgpu.wgmma(sums, x.transpose((1, 0)), dy)
        plgpu.wgmma_wait(BEHIND)
        return sums

    def sum_up(sums):
        spec = functools.partial(plgpu.BlockSpec, (pl.Element(DEPTH), SIDE), transforms=_tiled(x_ref.dtype), delay_release=BEHIND)
        specs = [spec(lambda i, side=side: (jnp.minimum(start + i * DEPTH, last), side)) for side in (k, n)]
        steps = pl.cdiv(end - start, DEPTH)
        plgpu.emit_pipeline(add, grid=(steps,), in_specs=specs, max_concurrent_steps=3, init_carry=sums)(x_ref, dy_ref)
        return sums[...]

    dw = pl.run_scoped(sum_up, plgpu.WGMMAAccumulatorRef((SIDE, SIDE), jnp.float32)).astype(dw_ref.dtype)
    for column in range(0, SIDE, DEPTH):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_ref[...] = dw[:, column : column + DEPTH]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_ref, dw_ref.at[expert, pl.ds(k * SIDE, SIDE), pl.ds(n * SIDE + column, DEPTH)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _swizzle(dtype):
    """Of rows of `DEPTH` values: threads meet no two of them in one bank."""
    return plgpu.SwizzleTransform(DEPTH * dtype.itemsize)


def _tiled(dtype):
    """As the tensor cores take them."""
    return plgpu.TilingTransform((8, DEPTH)), _swizzle(dtype)


def _at_least(rows: int, x_RK: jax.Array) -> jax.Array:
    """With rows of zeros behind those of x, where these are fewer than are fetched at once."""
    return jnp.pad(x_RK, ((0, max(0, rows - len(x_RK))), (0, 0)))
