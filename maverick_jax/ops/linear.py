"""Matrix products with float32 accumulation, by weights as they are, quantized, or adapted (LoRA).

Of an adapted weight, `base + scale * a b`, the thin matrices are multiplied one after the other: no merged copy is made.
Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

import dataclasses
import functools
import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from maverick_jax.ops.product import product
from maverick_jax.ops.quantize import QuantizedArray, Weight, halves, scale

FEW_ROWS, WIDE = 32, 2048  # measured: with more rows, or fewer columns, the usual form is quicker
LEAST_BFLOAT16_ROWS = 4  # of a product on CPU
PRODUCT = "product"  # the name by which a gradient may keep it
PARTS = 4  # of the sums of a single float32 row on CPU


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankArray:
    """An adapted weight on its way through a computation.

    Attributes:
      base: [*E, *K, *N], or quantized.
      a: [*E, *K, r] in any float dtype; products take it in that of the activations.
      b: [*E, r, *N].
      ranks: of several adapters that lie side by side, how many of the r are each one's; () is a single one, which all rows have.
      adapter_B: int32, which of several each row of the activations has, counted from 1; 0 is none.
    """

    base: Weight
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})
    ranks: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    adapter_B: jax.Array | None = None


AdaptedWeight = Weight | LowRankArray


def base_of(weight: AdaptedWeight) -> Weight:
    """What was there before anything was learned."""
    return weight.base if isinstance(weight, LowRankArray) else weight


def linear(x: jax.Array, weight: AdaptedWeight, *, contract: int = 1) -> jax.Array:
    """Contract the last `contract` axes of x with the first of `weight`; float32 sums, x's dtype out.

    Args:
      x: [..., *K] activations.
      weight: [*K, *N] in the same dtype, or adapted, or quantized: dequantized to x's dtype on its way into the product.

    Returns:
      [..., *N] in x's dtype.
    """
    return checkpoint_name(linear_float32(x, weight, contract=contract).astype(x.dtype), PRODUCT)


def linear_float32(x: jax.Array, weight: AdaptedWeight, *, contract: int = 1) -> jax.Array:
    """As `linear`, but the float32 sums are returned as they are (router scores, logits)."""
    if isinstance(weight, LowRankArray):
        thin = own_ranks(linear(x, weight.a.astype(x.dtype), contract=contract), weight)
        learned = linear_float32(thin, weight.b.astype(x.dtype))
        return linear_float32(x, weight.base, contract=contract) + weight.scale * learned
    if isinstance(weight, QuantizedArray):
        return _quantized(x, weight, contract)
    rows = math.prod(x.shape[: x.ndim - contract])
    # XLA:CPU multiplies few rows slowly in the form that suits many; each dtype has its own better one.
    cpu = _product
    if x.dtype == jnp.bfloat16 and 0 < rows < LEAST_BFLOAT16_ROWS:
        cpu = _padded
    elif x.dtype == jnp.float32 and rows == 1 and math.prod(weight.shape[:contract]) % PARTS == 0:
        cpu = _in_parts
    elif x.dtype == jnp.float32 and 2 < rows <= FEW_ROWS and math.prod(weight.shape[contract:]) >= WIDE:
        cpu = _rows_last
    if cpu is _product:
        return _product(x, weight, contract)
    default, cpu = (functools.partial(form, contract=contract) for form in (_product, cpu))
    return lax.platform_dependent(x, weight, cpu=cpu, default=default)


def own_ranks(thin: jax.Array, weight: LowRankArray) -> jax.Array:
    """What `a` has made of activations, without what it has made of a row by other adapters than the row's own.

    All adapters of a weight are one product so: for some dozens of ranks that costs less than to gather each row's own matrices.

    Args:
      thin: [..., r], its rows in order, equally many for each of `adapter_B`.
    """
    if not weight.ranks:
        return thin
    assert weight.adapter_B is not None, "nobody has said which rows have which adapter"
    owner_r = np.repeat(np.arange(1, len(weight.ranks) + 1, dtype=np.int32), weight.ranks)
    own_B1r = weight.adapter_B[:, None, None] == owner_r[None, None, :]
    return jnp.where(own_B1r, thin.reshape(len(weight.adapter_B), -1, len(owner_r)), 0).reshape(thin.shape)


def _quantized(x, weight, contract):
    if not weight.packed:
        return linear_float32(x, scale(weight.values, weight.scales, dtype=x.dtype), contract=contract)
    # Even and odd inputs apart: to bring their weights in order again, XLA:TPU makes copies of eight times the packed matrix.
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd = (
        linear_float32(pairs[..., i], scale(half, weight.scales, dtype=x.dtype), contract=contract)
        for i, half in enumerate(halves(weight.values))
    )
    return even + odd


def _product(x, weight, contract):
    return _exact(x, weight, contract) if x.dtype == jnp.float32 else cast(jax.Array, _narrow(x, weight, contract))


def _exact(x, weight, contract):
    return product(x, weight, (range(x.ndim - contract, x.ndim), range(contract)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow(x, weight, contract):
    """Gradients are products of narrow operands too: the float32 gradient of float32 sums would make the weights float32 for its own."""
    return _exact(x, weight, contract)


def _narrow_forward(x, weight, contract):
    return _exact(x, weight, contract), (x, weight)


def _narrow_backward(contract, residuals, dy):
    x, weight = residuals
    dy, leading = dy.astype(x.dtype), range(x.ndim - contract)
    dx = product(dy, weight, (range(len(leading), dy.ndim), range(contract, weight.ndim)))
    return dx.astype(x.dtype), product(x, dy, (leading, leading)).astype(weight.dtype)


_narrow.defvjp(_narrow_forward, _narrow_backward)


def _padded(x, weight, contract):
    """A single bfloat16 row runs a naive loop, 20 times as slow; two and three run the vectorised kernel slower than four."""
    leading, inner = x.shape[: x.ndim - contract], x.shape[x.ndim - contract :]
    rows = x.reshape(-1, *inner)
    padding = [(0, LEAST_BFLOAT16_ROWS - len(rows)), *[(0, 0)] * contract]
    y = _product(jnp.pad(rows, padding), weight, contract)[: len(rows)]
    return y.reshape(*leading, *weight.shape[contract:])


def _in_parts(x, weight, contract):
    """A single float32 row: the products of some parts of its inputs run at once, where one of a small matrix has a core to itself."""
    leading, inputs = x.shape[: x.ndim - contract], math.prod(weight.shape[:contract])
    weight_PKN = weight.reshape(PARTS, inputs // PARTS, -1)
    y_PN = product(x.reshape(PARTS, -1), weight_PKN, ((1,), (1,)), ((0,), (0,)))
    return sum(y_PN[1:], start=y_PN[0]).reshape(*leading, *weight.shape[contract:])  # not a reduction, which a slower library takes over


def _rows_last(x, weight, contract):
    """Written as [K, rows] times [K, N], few float32 rows run another kernel, mostly 1.3 to 1.9 times as fast (docs/performance.md)."""
    leading, inner = x.shape[: x.ndim - contract], x.shape[x.ndim - contract :]
    x_KR = lax.optimization_barrier(x.reshape(-1, math.prod(inner)).T)  # or the transposition is folded into the product
    y = product(x_KR, weight.reshape(x_KR.shape[0], -1), ((0,), (0,)))
    return y.reshape(*leading, *weight.shape[contract:])
