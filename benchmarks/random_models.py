"""Models and stacks of experts at full width with random weights: what a measurement of speed needs of a checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from maverick_jax.config import Config
from maverick_jax.model import Llama4
from maverick_jax.model.parameter import parameter_name
from maverick_jax.ops.quantize import FORMATS, QuantizedArray, Weight, quantized_shapes
from maverick_jax.plan.weights import abstract_model


def cut(config: Config, layers: int) -> Config:
    """Its first layers."""
    kept = {name: tuple(i for i in getattr(config.text, name) if i < layers) for name in ("moe_layers", "nope_layers")}
    return dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=layers, **kept))


def random_weight(dtype: str, shape: tuple[int, int, int]) -> Weight:
    """A stack of experts, as it is stored."""
    if dtype not in FORMATS:
        return random_array(0, shape, jnp.dtype(dtype))
    values, scales = quantized_shapes(shape, FORMATS[dtype], outputs=1, experts=True)
    return QuantizedArray(random_array(0, values, FORMATS[dtype].values), jnp.full(scales, 1e-3, FORMATS[dtype].scales))


def random_array(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Of the first axis one after the other: random numbers take more memory than what they become."""

    def one(key):
        if jnp.issubdtype(dtype, jnp.integer):
            return lax.bitcast_convert_type(jax.random.bits(key, shape[1:], jnp.uint8), dtype)
        return (jax.random.normal(key, shape[1:], jnp.bfloat16) * (50 if dtype.itemsize == 1 else 0.02)).astype(dtype)

    return jax.jit(lambda key: lax.map(one, jax.random.split(key, shape[0])))(jax.random.key(seed, impl="rbg"))


def random_model(config: Config, dtype: str) -> Llama4:
    """Of real shapes; norms are ones."""
    graphdef, state = nnx.split(abstract_model(config, dtype))
    for seed, (path, leaf) in enumerate(nnx.to_flat_state(state)):
        if parameter_name(path).endswith(".scales"):
            leaf.set_value(jnp.full(leaf.shape, 2e-4, leaf.dtype))
        elif len(leaf.shape) == 1:
            leaf.set_value(jnp.ones(leaf.shape, leaf.dtype))
        else:
            leaf.set_value(random_array(seed, leaf.shape, jnp.dtype(leaf.dtype)))
    return nnx.merge(graphdef, state)
