"""Adapters (LoRA) in a model: which weights can have one, and the module that then takes a weight's place.

An adapted weight `X` has the leaves `X.base` (or `X.base.values` and `X.base.scales`), which stays as it is, and `X.a` and `X.b`, which
are learned; what they stand for says `ops.linear`. They lie on the mesh as the weight does, the rank undivided.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from types import EllipsisType
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from maverick_jax.config.checks import POSITIVE, is_whole, show
from maverick_jax.errors import UserError
from maverick_jax.model.llama4 import Llama4
from maverick_jax.model.parameter import Axes, Sides, float_dtype, parameter_name, replace_weight
from maverick_jax.model.quantized import COMPONENTS, QuantizedWeight, component
from maverick_jax.ops.linear import LowRankArray
from maverick_jax.ops.quantize import Shape
from maverick_jax.sharding.layout import Constrain

Leaf = jax.Array | jax.ShapeDtypeStruct
ADAPTABLE = (*COMPONENTS, "router", "unembedding", "vision")
LOOKED_UP = ("class_embedding", "position_embedding")  # and not multiplied by


class LowRank(nnx.Module):
    """In a weight's place: `weight[...]` is what a product takes, `weight.shape` what it stands for. `ranks`: as of `LowRankArray`."""

    def __init__(self, base: nnx.Param | QuantizedWeight, a: nnx.LoRAParam, b: nnx.LoRAParam, scale: float, ranks: tuple[int, ...] = ()):
        self.base = base
        self.a = a
        self.b = b
        self.scale = scale
        self.ranks = ranks
        self.adapter_B: jax.Array | None = nnx.data(None)

    def __getitem__(self, _: EllipsisType) -> LowRankArray:
        return LowRankArray(self.base[...], self.a[...], self.b[...], self.scale, self.ranks, self.adapter_B)

    @property
    def shape(self) -> Shape:
        return self.base.shape


class Adaptable(NamedTuple):
    """A weight that meets activations in a product. `component` is one of `ADAPTABLE`."""

    path: tuple
    weight: nnx.Param | QuantizedWeight
    component: str
    axes: Axes
    sides: Sides

    @property
    def name(self) -> str:
        return parameter_name(self.path)

    def thin(self, rank: int) -> tuple[Thin, Thin]:
        """What `a` and `b` are."""
        stack, outputs = slice(self.sides.stack), slice(sum(self.sides), None)
        inwards, outwards = slice(sum(self.sides)), self.weight.shape[outputs]
        a = Thin((*self.weight.shape[inwards], rank), (*self.axes[inwards], None))
        return a, Thin((*self.weight.shape[stack], rank, *outwards), (*self.axes[stack], None, *self.axes[outputs]))

    @property
    def fan_in(self) -> int:
        return math.prod(self.weight.shape[self.sides.stack : sum(self.sides)])


class Thin(NamedTuple):
    """Shape and logical axes of a thin matrix, or of a stack of them."""

    shape: Shape
    axes: Axes


def adaptable(model: Llama4) -> list[Adaptable]:
    """Every weight that can have an adapter, and has none yet, by name."""
    found = []
    for path, module in nnx.iter_modules(model):
        if isinstance(module, LowRank | QuantizedWeight):
            continue
        for attribute, weight in vars(module).items():
            known = vars(weight) if isinstance(weight, QuantizedWeight) else weight.get_metadata() if isinstance(weight, nnx.Param) else {}
            if "sides" in known and (part := _component((*path, attribute))):
                found.append(Adaptable((*path, attribute), weight, part, known["axes"], known["sides"]))
    return sorted(found, key=lambda weight: weight.name)


def _component(path: tuple) -> str | None:
    match path:
        case ("text", "unembedding"):
            return "unembedding"
        case ("text", "layers", _, "feed_forward", "router"):
            return "router"
        case ("vision", *_) | ("projector",) if path[-1] not in LOOKED_UP:
            return "vision"
    return component(path)


def add_adapters(model: Llama4, ranks: Mapping[str, int], *, scale: float = 2.0, dtype: DTypeLike = "float32", seed: int = 0) -> list[str]:
    """Give the weights of these components adapters that change nothing yet: `a` random, `b` zero.

    Args:
      model: on its devices, or abstract.
      ranks: component, of `ADAPTABLE`, -> rank.
      scale: what the product of the thin matrices is multiplied by; elsewhere alpha / rank.
      dtype: what they are learned in.
      seed: of `a`, which is uniform within 1 / sqrt(inputs), as PEFT has it; the same on any mesh.

    Returns:
      The names of the weights.

    Raises:
      UserError: no such component, a rank that is none, or nothing to adapt.
    """
    for part, rank in ranks.items():
        if part not in ADAPTABLE:
            raise UserError(f"adapters are asked for in {show(part)}: choose from {', '.join(ADAPTABLE)}.")
        if not is_whole(rank) or rank < 1:
            raise UserError(f"the rank of adapters in {part} is {show(rank)}: give a whole number from 1.")
    if not POSITIVE.holds(scale):
        raise UserError(f"the scale of adapters is {show(scale)}: give a number above 0.")
    chosen = [weight for weight in adaptable(model) if weight.component in ranks]
    if not chosen:
        raise UserError(f"this model has no weights in {', '.join(ranks) or 'no component'} that could have adapters.")
    for weight in chosen:
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(weight.name.encode()))
        bounds = (1 / math.sqrt(weight.fan_in), 0.0)
        a, b = (
            _new(model, weight, thin, bound, key, float_dtype(dtype))
            for thin, bound in zip(weight.thin(ranks[weight.component]), bounds, strict=True)
        )
        set_adapter(model, weight, a, b, scale)
    return [weight.name for weight in chosen]


def set_adapter(model: Llama4, weight: Adaptable, a: Leaf, b: Leaf, scale: float, ranks: tuple[int, ...] = ()) -> None:
    """Put these thin matrices beside a weight; `ranks`: as of `LowRankArray`."""
    thin = zip((a, b), weight.thin(a.shape[-1]), strict=True)
    a_param, b_param = (nnx.LoRAParam(values, axes=expected.axes) for values, expected in thin)
    replace_weight(model, weight.path, LowRank(weight.weight, a_param, b_param, float(scale), ranks))


def adapters(model: Llama4) -> dict[str, LowRank]:
    """Every adapted weight, by name."""
    found = {parameter_name(path): module for path, module in nnx.iter_modules(model) if isinstance(module, LowRank)}
    return dict(sorted(found.items()))


def place(model: Llama4, weight: Adaptable, thin: Thin) -> Sharding:
    """Where a thin matrix beside this weight lies."""
    if isinstance(model.constrain, Constrain):
        return model.constrain.sharding(thin.axes, thin.shape)
    return jax.tree.leaves(weight.weight)[0].sharding


def _new(model, weight, thin, bound, key, dtype):
    sharding = place(model, weight, thin)
    if isinstance(jax.tree.leaves(weight.weight)[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(thin.shape, dtype, sharding=sharding)
    return _uniform(thin.shape, dtype, sharding)(key, bound)


@functools.cache
def _uniform(shape, dtype, sharding):
    def draw(key, bound):
        return bound * jax.random.uniform(key, shape, dtype, -1, 1)

    return jax.jit(draw, out_shardings=sharding)
