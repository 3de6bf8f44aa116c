"""Every parameter of a model by what it belongs to, with the bytes that a dtype gives it.

Shapes, dtypes and logical axes come from the model itself (`get_abstract_model`, `set_quantized`).
"""

from __future__ import annotations

import collections
import difflib
import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.inference.checks import shown
from maverick_jax.model import quantized
from maverick_jax.model.llama4 import Llama4, get_abstract_model
from maverick_jax.model.parameter import Axes
from maverick_jax.ops.quantize import FORMATS

# The dtype of all but the routed experts, of the cache and of activations. In a quantized format only the routed experts are
# narrower; `fp8` is the released FP8 checkpoint (spec section 5.2).
DTYPES = {"bfloat16": "bfloat16", "float32": "float32", **dict.fromkeys(FORMATS, "bfloat16")}
ROUTED, SHARED, DENSE, ATTENTION = "routed experts", "shared experts", "dense layers", "attention"
EMBEDDING, UNEMBEDDING, SMALL, VISION = "embedding", "unembedding", "routers, norms", "vision"
COMPONENTS: tuple[str, ...] = (ROUTED, SHARED, DENSE, ATTENTION, EMBEDDING, UNEMBEDDING, SMALL, VISION)
_PARTS = {"experts": ROUTED, "shared": SHARED, "dense": DENSE, "attention": ATTENTION}


class Kind(NamedTuple):
    """Leaves that are alike: what they belong to, logical axes, shape, bytes per element, and how many there are."""

    component: str
    axes: Axes
    shape: tuple[int, ...]
    itemsize: int
    number: int


def abstract_model(config: Config, dtype: str, **options) -> Llama4:
    """A model of one of `DTYPES`, its routed experts quantized where the dtype says so. Options as for `Llama4`."""
    model = get_abstract_model(config, dtype=DTYPES[dtype], **options)
    if dtype in FORMATS:
        quantized.set_quantized(model, quantized.quantized_leaves(model, dtype))
    return model


@functools.lru_cache
def stored(config: Config, dtype: str) -> list[Kind]:
    """Everything that is stored, scales included."""
    return kinds(nnx.to_flat_state(nnx.state(abstract_model(config, dtype))))


def kinds(leaves: Iterable[tuple[tuple, nnx.Variable]]) -> list[Kind]:
    """Leaves by their paths, those that are alike counted."""
    found: collections.Counter = collections.Counter()
    for path, leaf in leaves:
        found[component(path), leaf.get_metadata()["axes"], leaf.shape, jnp.dtype(leaf.dtype).itemsize] += 1
    return [Kind(part, axes, shape, size, number) for (part, axes, shape, size), number in found.items()]


def parameters(config: Config) -> dict[tuple[str, Axes, tuple[int, ...]], int]:
    """(component, logical axes, shape) -> how many parameters are like that, before anything is quantized."""
    return {(part, axes, shape): count for part, axes, shape, _, count in stored(config, "bfloat16")}


def component(path: tuple) -> str:
    """`("text", "layers", 1, "feed_forward", "experts", "gate")` -> "routed experts"."""
    if path[0] != "text":
        return VISION
    if len(path) == 2:
        return {"embedding": EMBEDDING, "unembedding": UNEMBEDDING}.get(path[1], SMALL)
    return _PARTS.get(quantized.component(path) or "", SMALL)


def itemsize(dtype: str) -> int:
    """Bytes of an element of activations and cache."""
    return jnp.dtype(DTYPES[dtype]).itemsize


def check_dtype(dtype: str) -> None:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        close = difflib.get_close_matches(str(dtype), DTYPES, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"dtype {shown(dtype)} is unknown: {meant}choose one of {', '.join(DTYPES)}.")
