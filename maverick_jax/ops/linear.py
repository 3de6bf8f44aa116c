"""Matrix products with float32 accumulation."""

import math

import jax
import jax.numpy as jnp
from jax import lax


def linear(x: jax.Array, weight: jax.Array, *, contract: int = 1) -> jax.Array:
    """Contract the last `contract` axes of x with the first of `weight`; float32 sums, x's dtype out.

    Args:
      x: [..., *K] activations.
      weight: [*K, *N] in the same dtype.

    Returns:
      [..., *N] in x's dtype.
    """
    return linear_float32(x, weight, contract=contract).astype(x.dtype)


def linear_float32(x: jax.Array, weight: jax.Array, *, contract: int = 1) -> jax.Array:
    """As `linear`, but the float32 sums are returned as they are (router scores, logits)."""
    leading = x.shape[: x.ndim - contract]
    dimensions = (((*range(x.ndim - contract, x.ndim),), (*range(contract),)), ((), ()))

    def product(x, weight):
        # On CPU `preferred_element_type` is also what selects XLA's native bfloat16 path.
        return lax.dot_general(x, weight, dimensions, preferred_element_type=jnp.float32)

    if x.dtype == jnp.bfloat16 and math.prod(leading) == 1:
        return lax.platform_dependent(x, weight, cpu=lambda x, w: _as_two_rows(product, x, w), default=product)
    return product(x, weight)


def _as_two_rows(product, x, weight):
    """XLA:CPU multiplies a single bfloat16 row with a naive loop; two rows run the vectorised kernel."""
    return lax.slice_in_dim(product(jnp.concatenate([x, x]), weight), 0, 1)
