"""A parameter: shape, logical axes and initial values in one declaration."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Axes = tuple[str | None, ...]


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, dtype: DTypeLike, *, fan_in: int | None = None) -> nnx.Param:
    """Normal values with deviation 1 / sqrt(fan_in); `fan_in` is the first size of a matrix unless given."""
    assert len(shape) == len(axes)
    deviation = 1 / math.sqrt(fan_in or shape[0])
    return nnx.Param(deviation * jax.random.normal(rngs.params(), shape, dtype), axes=axes)


def ones(shape: tuple[int, ...], axes: Axes, dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, dtype), axes=axes)


def zeros(shape: tuple[int, ...], axes: Axes, dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def parameter_name(path: tuple) -> str:
    """Dotted name of a leaf of `nnx.state`: ("text", "layers", 0, "attention", "query") -> "text.layers.0.attention.query"."""
    return ".".join(str(part) for part in path)
