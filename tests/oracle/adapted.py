"""Models with adapters that have learned something, and the plain models that they stand for."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from maverick_jax.adapter import save_adapter
from maverick_jax.model import Llama4
from maverick_jax.model.low_rank import ADAPTABLE, LowRank, adaptable, adapters, add_adapters
from maverick_jax.model.parameter import replace_weight

RANKS = {part: 2 + at % 3 for at, part in enumerate(ADAPTABLE)}
NAMED = {  # of adapters that have little in common: components, ranks, scales
    "support": ({"attention": 2, "experts": 3}, 0.5),
    "poems": ({"attention": 3, "dense": 2, "shared": 1, "router": 2, "unembedding": 2, "experts": 1}, 2.0),
    "law": ({"dense": 4}, 1.5),
}


def teach(model: Llama4, seed: int = 0) -> None:
    """Random values for the half of every adapter that begins at zero, wherever it lies."""
    random = np.random.default_rng(seed)
    for adapter in adapters(model).values():
        values = 0.1 * random.standard_normal(adapter.b.shape, np.float32)
        adapter.b.set_value(jnp.asarray(values, adapter.b.dtype, device=adapter.b[...].sharding))


def save_named(base: Llama4, folder: Path) -> dict[str, Path]:
    """Directories of adapters for a model, as `NAMED` has them."""
    paths = {}
    for seed, (name, (ranks, scale)) in enumerate(NAMED.items()):
        model = nnx.clone(base)
        add_adapters(model, ranks, scale=scale, seed=seed)
        teach(model, seed)
        paths[name] = save_adapter(model, folder / name)
    return paths


def merged(model: Llama4, base: Llama4 | None = None) -> Llama4:
    """A plain model with what base and adapters add up to.

    Args:
      base: with plain weights for those of `model`; None: they are its own.
    """
    if base is None:
        base = without_adapters(model)
    weights = {weight.name: weight for weight in adaptable(base)}
    for name, adapter in adapters(model).items():
        weight, stack = weights[name], weights[name].sides.stack
        a = np.asarray(adapter.a[...], np.float64).reshape(*adapter.a.shape[:stack], -1, adapter.a.shape[-1])
        b = np.asarray(adapter.b[...], np.float64).reshape(*adapter.b.shape[:stack], adapter.a.shape[-1], -1)
        summed = np.asarray(weight.weight[...], np.float64) + adapter.scale * (a @ b).reshape(weight.weight.shape)
        weight.weight.set_value(jnp.asarray(summed, weight.weight.dtype))
    return base


def without_adapters(model: Llama4) -> Llama4:
    """A copy that shares no parameter's object."""
    plain = nnx.clone(model)
    for path, module in [*nnx.iter_modules(plain)]:
        if isinstance(module, LowRank):
            replace_weight(plain, path, module.base)
    return plain
