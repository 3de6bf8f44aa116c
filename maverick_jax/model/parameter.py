"""A parameter: shape, logical axes and initial values in one declaration."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Axes = tuple[str | None, ...]


class Sides(NamedTuple):
    """What the axes of a weight are: `stack` axes of matrices, then `inputs` axes, then those of the outputs."""

    stack: int
    inputs: int


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, dtype: DTypeLike, *, stack: int = 0, inputs: int = 1, fan_in: int | None = None
) -> nnx.Param:
    """Normal values with deviation 1 / sqrt(fan_in), the size of the input axes unless given.

    Args:
      stack, inputs: as in `Sides`; by default a matrix with one input axis.
    """
    assert len(shape) == len(axes)
    deviation = 1 / math.sqrt(fan_in or math.prod(shape[stack : stack + inputs]))
    return nnx.Param(deviation * jax.random.normal(rngs.params(), shape, dtype), axes=axes, sides=Sides(stack, inputs))


def ones(shape: tuple[int, ...], axes: Axes, dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, dtype), axes=axes)


def zeros(shape: tuple[int, ...], axes: Axes, dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def parameter_name(path: tuple) -> str:
    """Dotted name of a leaf of `nnx.state`: ("text", "layers", 0, "attention", "query") -> "text.layers.0.attention.query"."""
    return ".".join(str(part) for part in path)
