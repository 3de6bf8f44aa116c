"""Quantized weights: what is stored, and what it stands for.

A quantized weight is a pair of arrays: `values` in 8 or 4 bits, and `scales`, one per output channel and group of inputs.
What it stands for is `values * scales`, computed in the dtype of the scales (so the released FP8 checkpoint, whose scales are
bfloat16, stands for exactly the bfloat16 weights that its own tools give).

    float8_e4m3fn  [*K, *N], scales [G, *N]
    int8           [*K, *N], scales [G, *N]
    uint8          two signed 4-bit values per byte, adjacent along the last input axis, the even one in the low half:
                   [*K with the last halved, *N], scales [G, *N]

Group g is inputs g * K/G ... (g + 1) * K/G of the flattened K; G = 1 is one scale per output channel. An expert stack has a leading
axis E on both arrays.

Shape suffixes: E experts, K inputs, N outputs, G groups of inputs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.typing import DTypeLike

Shape = tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A quantized weight on its way through a computation.

    Attributes:
      float8_rows: what meets a stack of float8 matrices is made float8 too, with a scale per row (`grouped_matmul`).
    """

    values: jax.Array
    scales: jax.Array
    float8_rows: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def packed(self) -> bool:
        """Whether a byte holds two values."""
        return self.values.dtype == jnp.uint8


Weight = jax.Array | QuantizedArray


class Format(NamedTuple):
    """How to quantize.

    Attributes:
      values, scales: dtypes as stored.
      largest: magnitude that the largest weight of a group becomes.
      group: inputs that share a scale; None for all.
    """

    values: np.dtype
    scales: np.dtype
    largest: float
    group: int | None = None

    @property
    def packed(self) -> bool:
        return self.values == np.uint8

    def groups(self, inputs: int) -> int:
        """Groups of an output channel with so many inputs: of `group`, or of the largest smaller size that divides them.

        Both values of a byte belong to one group.
        """
        if self.group is None:
            return 1
        step = 1 + self.packed
        return next(inputs // size for size in range(min(self.group, inputs) // step * step, 0, -step) if inputs % size == 0)


FORMATS = {
    # The release's own: `compressed-tensors` keeps the scales in the model's dtype (spec section 5.2).
    "fp8": Format(np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16), 448.0),
    "int8": Format(np.dtype(np.int8), np.dtype(np.float32), 127.0),
    "int4": Format(np.dtype(np.uint8), np.dtype(np.float32), 8.0, group=128),
}
FLOAT8 = FORMATS["fp8"].values
COLUMNS = 256  # quantized at once, so that float32 copies stay small beside the weight


def quantized_shapes(shape: Shape, form: Format, *, outputs: int, experts: bool) -> tuple[Shape, Shape]:
    """Shapes of values and scales of a weight.

    Args:
      shape: [*K, *N], with a leading E if `experts`.
      outputs: number of output axes.
    """
    lead, rest = shape[: int(experts)], shape[int(experts) :]
    inputs, after = rest[:-outputs], rest[-outputs:]
    packed = (*inputs[:-1], inputs[-1] // 2) if form.packed else inputs
    return (*lead, *packed, *after), (*lead, form.groups(math.prod(inputs)), *after)


def quantize(weight_KN: np.ndarray, form: Format) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of one matrix, on the host.

    Args:
      weight_KN: [K, N], bfloat16, float16 or float32; finite.

    Returns:
      values [K, N] (packed: [K/2, N]) and scales [G, N].
    """
    K, N = weight_KN.shape
    G = form.groups(K)
    values, scales = np.empty((K // 2 if form.packed else K, N), form.values), np.empty((G, N), form.scales)
    for at in range(0, N, COLUMNS):
        columns = slice(at, at + COLUMNS)
        w_GkN = weight_KN[:, columns].astype(np.float32).reshape(G, K // G, -1)
        scales[:, columns], rounded = _quantize_groups(w_GkN, form)
        rounded = rounded.reshape(K, -1)
        values[:, columns] = pack(rounded) if form.packed else rounded
    return values, scales


def _quantize_groups(w_GkN: np.ndarray, form: Format) -> tuple[np.ndarray, np.ndarray]:
    if form.packed:  # from -8 to 7: the value of the largest magnitude becomes -8, whatever its sign
        index = np.abs(w_GkN).argmax(axis=1, keepdims=True)
        scale_G1N = np.take_along_axis(w_GkN, index, axis=1) / -form.largest
    else:
        scale_G1N = np.abs(w_GkN).max(axis=1, keepdims=True) / form.largest
    scale_G1N = scale_G1N.astype(form.scales)
    scale_G1N = np.where(scale_G1N == 0, form.scales.type(1), scale_G1N)  # also where rounding made it zero
    scaled = w_GkN / scale_G1N.astype(np.float32)
    if form.values.kind == "V":  # float8: its own rounding
        return scale_G1N[:, 0], np.clip(scaled, -form.largest, form.largest).astype(form.values)
    return scale_G1N[:, 0], np.clip(np.rint(scaled), -form.largest, form.largest - form.packed).astype(np.int8)


def pack(values_KN: np.ndarray) -> np.ndarray:
    """[K, N] int8 in -8..7 -> [K/2, N] uint8."""
    low, high = values_KN[0::2].view(np.uint8) & 15, values_KN[1::2].view(np.uint8) << 4
    return low | high


def unpack(values: jax.Array, axis: int) -> jax.Array:
    """uint8 -> int8 in -8..7, twice as long on `axis`."""
    pairs = jnp.stack(halves(values), axis=axis + 1)
    return pairs.reshape(*values.shape[:axis], 2 * values.shape[axis], *values.shape[axis + 1 :])


def halves(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 -> the values of even inputs and those of odd inputs, int8 in -8..7."""
    return jnp.left_shift(values, 4).view(jnp.int8) >> 4, values.view(jnp.int8) >> 4


def dequantize(weight: QuantizedArray, *, inputs: int = 1, lead: int = 0, dtype: DTypeLike | None = None) -> jax.Array:
    """The whole weight.

    Args:
      inputs: number of input axes.
      lead: number of axes before them (1 for an expert stack).
      dtype: what the products, made in the dtype of the scales, are cast to; None leaves them as they are.
    """
    values = unpack(weight.values, lead + inputs - 1) if weight.packed else weight.values
    return scale(values, weight.scales, lead=lead, dtype=dtype)


def scale(values: jax.Array, scales: jax.Array, *, lead: int = 0, dtype: DTypeLike | None = None) -> jax.Array:
    """`values * scales` in the dtype of the scales, then cast to `dtype`.

    Args:
      values: [*lead, *K, *N] unpacked, or one of their `halves`.
      scales: [*lead, G, *N].
    """
    dtype = jnp.dtype(dtype or scales.dtype)
    grouped = (*scales.shape[: lead + 1], -1, *scales.shape[lead + 1 :])
    product = values.astype(jnp.float32).reshape(grouped) * jnp.expand_dims(scales.astype(jnp.float32), lead + 1)
    if dtype != scales.dtype and scales.dtype != jnp.float32:
        # A cast to the scales' dtype and on to a wider one would be left out: XLA may keep more precision than was asked for.
        kept = jnp.finfo(scales.dtype)
        product = lax.reduce_precision(product, kept.nexp, kept.nmant)
    return product.reshape(values.shape).astype(dtype)


def matrix_shape(weight: Weight) -> Shape:
    """[..., K, N] of a matrix or of a stack of them, however it is stored."""
    if not isinstance(weight, QuantizedArray):
        return weight.shape
    *lead, rows, N = weight.values.shape
    return *lead, rows * (1 + weight.packed), N
