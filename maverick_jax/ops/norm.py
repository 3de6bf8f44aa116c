"""Normalisation: RMS (text) and layer norm (vision), computed in float32."""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, cast to x's dtype, then scaled.

    Args:
      x: [..., D] any float dtype.
      weight: [D], or None for the weightless norm of queries and keys.
      eps: added to the mean square.

    Returns:
      [..., D] in x's dtype. The cast comes before the weight, as in both references (spec section 2).
    """
    x32 = x.astype(jnp.float32)
    y = (x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return y if weight is None else y * over_last_axis(weight, x.ndim)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Layer norm with bias over the last axis of x: [..., D], computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = centred * lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    scale32, bias32 = (over_last_axis(v.astype(jnp.float32), x.ndim) for v in (scale, bias))
    return (y * scale32 + bias32).astype(x.dtype)


def over_last_axis(vector: jax.Array, ndim: int) -> jax.Array:
    """[D] -> [1, ..., 1, D]: ranks are never promoted silently here."""
    return lax.expand_dims(vector, range(ndim - 1))
