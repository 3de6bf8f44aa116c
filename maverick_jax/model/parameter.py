"""A parameter: shape, logical axes and initial values in one declaration."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from maverick_jax.config.checks import show
from maverick_jax.errors import UserError

Axes = tuple[str | None, ...]
DTYPES = ("bfloat16", "float16", "float32")


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


def float_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype that a caller asks for.

    Raises:
      UserError: it is none of weights and activations.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if dtype is None or name not in DTYPES:  # NumPy takes None for float64
        raise UserError(f"dtype {show(dtype)} is not supported: choose one of {', '.join(DTYPES)}.")
    return jnp.dtype(name)


def ones(shape: tuple[int, ...], axes: Axes, dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, dtype), axes=axes)


def zeros(shape: tuple[int, ...], axes: Axes, dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def parameter_name(path: tuple) -> str:
    """Dotted name of a leaf of `nnx.state`: ("text", "layers", 0, "attention", "query") -> "text.layers.0.attention.query"."""
    return ".".join(str(part) for part in path)


def replace_weight(model: nnx.Module, path: tuple, module: nnx.Module) -> None:
    """Put a module in the place of a parameter, or of another module that stands in one's."""
    parent: Any = model
    for part in path[:-1]:
        parent = parent[part] if isinstance(part, int) else getattr(parent, str(part))
    setattr(parent, str(path[-1]), module)
