"""Every parameter of a model by what it belongs to, with the bytes that a dtype gives it.

Shapes and logical axes come from the model itself (`get_abstract_model`).
"""

from __future__ import annotations

import collections
import functools

import jax.numpy as jnp
from flax import nnx

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.model.llama4 import get_abstract_model
from maverick_jax.model.parameter import Axes

# The dtype of all but the routed experts, and of the routed experts. `fp8` is the released FP8 checkpoint: expert
# matrices in float8_e4m3fn with a bfloat16 scale per output channel (spec section 5.2).
DTYPES = {
    "bfloat16": ("bfloat16", "bfloat16"),
    "float32": ("float32", "float32"),
    "fp8": ("bfloat16", "float8_e4m3fn"),
}
ROUTED, SHARED, DENSE, ATTENTION = "routed experts", "shared experts", "dense layers", "attention"
EMBEDDING, UNEMBEDDING, SMALL, VISION = "embedding", "unembedding", "routers, norms", "vision"
COMPONENTS: tuple[str, ...] = (ROUTED, SHARED, DENSE, ATTENTION, EMBEDDING, UNEMBEDDING, SMALL, VISION)


@functools.lru_cache
def parameters(config: Config) -> dict[tuple[str, Axes, tuple[int, ...]], int]:
    """(component, logical axes, shape) -> how many parameters are like that."""
    found: collections.Counter = collections.Counter()
    for path, leaf in nnx.to_flat_state(nnx.state(get_abstract_model(config))):
        found[component(path), leaf.get_metadata()["axes"], leaf.shape] += 1
    return dict(found)


def component(path: tuple) -> str:
    """`("text", "layers", 1, "feed_forward", "experts", "gate")` -> "routed experts"."""
    if path[0] != "text":
        return VISION
    if len(path) == 2:
        return {"embedding": EMBEDDING, "unembedding": UNEMBEDDING}.get(path[1], SMALL)
    match path[3:]:
        case ("attention", *_):
            return ATTENTION
        case ("feed_forward", "experts", _):
            return ROUTED
        case ("feed_forward", "shared", _):
            return SHARED
        case ("feed_forward", "gate" | "up" | "down"):
            return DENSE
    return SMALL


def itemsize(dtype: str, *, routed: bool = False) -> int:
    """Bytes of an element of the routed experts, or of everything else (activations and cache included)."""
    return jnp.dtype(DTYPES[dtype][routed]).itemsize


def stored(config: Config, dtype: str) -> list[tuple[str, Axes, tuple[int, ...], int, int]]:
    """(component, logical axes, shape, bytes per element, how many) of everything that is stored, FP8 scales included."""
    found = []
    for (part, axes, shape), count in parameters(config).items():
        found.append((part, axes, shape, itemsize(dtype, routed=part == ROUTED), count))
        if part == ROUTED and dtype == "fp8":
            found.append((part, (axes[0], axes[2]), (shape[0], shape[2]), itemsize(dtype), count))
    return found


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}.")
