"""What an all-to-all carries: rows in their own dtype, in bfloat16, or in FP8 with a scale per row.

Shape suffixes: N devices, C rows per device, D model width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

FP8 = "float8_e4m3fn"
WIRES = (None, "bfloat16", FP8)
LARGEST = 448.0  # of float8_e4m3fn


def exchange(x_NCD: jax.Array, axes: tuple[str, ...], wire: str | None) -> jax.Array:
    """All-to-all over `axes` inside `shard_map`: axis 0 names the destination before and the source after.

    Args:
      wire: dtype that travels, one of `WIRES`; None is x's own. Gradients travel back in x's dtype, or in bfloat16.
    """
    if wire == FP8:
        return _exchange_fp8(x_NCD, axes)
    return all_to_all(x_NCD.astype(wire or x_NCD.dtype), axes).astype(x_NCD.dtype)


def all_to_all(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _exchange_fp8(x_NCD, axes):
    """One message: a row's bytes and behind them its float32 scale."""
    x32 = x_NCD.astype(jnp.float32)
    scale_NC1 = jnp.maximum(jnp.abs(x32).max(axis=-1, keepdims=True) / LARGEST, jnp.finfo(jnp.float32).tiny)
    rows = lax.bitcast_convert_type((x32 / scale_NC1).astype(FP8), jnp.uint8)
    scales = lax.bitcast_convert_type(scale_NC1[..., 0], jnp.uint8)
    received = all_to_all(jnp.concatenate([rows, scales], axis=-1), axes)
    D = x_NCD.shape[-1]
    x32 = lax.bitcast_convert_type(received[..., :D], FP8).astype(jnp.float32)
    return (x32 * lax.bitcast_convert_type(received[..., D:], jnp.float32)[..., None]).astype(x_NCD.dtype)


def _forward(x_NCD, axes):
    return _exchange_fp8(x_NCD, axes), None


def _backward(axes, _, dy_NCD):
    return (all_to_all(dy_NCD, axes),)  # the rounding passes gradients as they are


_exchange_fp8.defvjp(_forward, _backward)
