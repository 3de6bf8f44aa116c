"""Products with float32 sums, in which float32 means float32 on every platform.

Unless it is asked for more, JAX multiplies float32 as TF32 on NVIDIA GPUs (a tiny model's logits are off by 6e-3 there) and as
bfloat16 on TPUs. It costs narrower operands nothing.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def precision(dtype: DTypeLike) -> lax.Precision | None:
    """What a product of operands of a dtype is to ask for."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product(
    a: jax.Array, b: jax.Array, contract: tuple[Sequence[int], Sequence[int]], batch: tuple[Sequence[int], Sequence[int]] = ((), ())
) -> jax.Array:
    """Contract axes of `a` with axes of `b`; in kernels too.

    Args:
      a, b: of one dtype.
      contract, batch: axes of `a` and of `b`, as `lax.dot_general` takes them.

    Returns:
      float32: batch axes, then those left of `a`, then those left of `b`.
    """
    # On CPU `preferred_element_type` is also what selects XLA's native bfloat16 path.
    return lax.dot_general(a, b, (contract, batch), precision=precision(a.dtype), preferred_element_type=jnp.float32)


def einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, in float32."""
    return jnp.einsum(subscripts, a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32)
