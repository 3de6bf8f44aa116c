"""Dense SwiGLU feed-forward.

Shape suffixes: D model width, F feed-forward width.
"""

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from maverick_jax.model.parameter import weight
from maverick_jax.ops.swiglu import swiglu


class FeedForward(nnx.Module):
    """`down(silu(gate(x)) * up(x))`: a dense layer's, and the shared expert of a mixture."""

    def __init__(self, D: int, F: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gate = weight(rngs, (D, F), ("embed", "mlp"), dtype)
        self.up = weight(rngs, (D, F), ("embed", "mlp"), dtype)
        self.down = weight(rngs, (F, D), ("mlp", "embed"), dtype)

    def __call__(self, x: jax.Array, real: Any = None, expert: Any = None) -> tuple[jax.Array, None]:
        """x: [..., D] -> ([..., D], None): a dense layer routes nothing."""
        return self.sums(x).astype(x.dtype), None

    def sums(self, x: jax.Array) -> jax.Array:
        """[..., D] float32: what it gives before that is rounded to x's dtype."""
        return swiglu(x, self.gate[...], self.up[...], self.down[...])
