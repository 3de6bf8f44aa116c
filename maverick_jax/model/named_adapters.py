"""Several adapters beside one base: each row of a batch has one of them, or none.

Those of a weight lie side by side and are multiplied as one, whose rank is the sum of theirs; of what `a` gives, a row keeps its own
(`ops.linear.own_ranks`). So a row without an adapter gets the base's result and an exact zero, and rows share every product.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax
from flax import nnx
from jax import lax

from maverick_jax.model.compiled import take_apart
from maverick_jax.model.llama4 import Llama4
from maverick_jax.model.low_rank import LowRank, adaptable, set_adapter


class Joined(NamedTuple):
    """The thin matrices of all adapters of a weight, the scale of each in its part of `b`; an adapter without any has rank 0."""

    a: jax.Array
    b: jax.Array
    ranks: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class NamedAdapters:
    """Adapters for one model.

    Attributes:
      digests: what tells each adapter's values apart, by its name; the order is that of the numbers, from 1.
      joined: by the name of the weight.
    """

    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    joined: Mapping[str, Joined] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.digests)

    def number(self, name: str | None) -> int:
        """0 for none."""
        return 0 if name is None else 1 + self.names.index(name)

    def beside(self, model: Llama4) -> Llama4:
        """A model of the same parameters, with all of them; `choose` is to say which rows have which. Without any, the model itself."""
        if not self.joined:
            return model
        adapted = _copy(model)
        for weight in adaptable(adapted):
            if weight.name in self.joined:
                a, b, ranks = self.joined[weight.name]
                set_adapter(adapted, weight, a, b, 1.0, ranks)
        return adapted

    def alone(self, model: Llama4, name: str | None) -> Llama4:
        """A model of the same parameters, with one of them for all rows."""
        if name is None:
            return model
        adapted, at = _copy(model), self.names.index(name)
        for weight in adaptable(adapted):
            if weight.name in self.joined and self.joined[weight.name].ranks[at]:
                a, b, ranks = self.joined[weight.name]
                start, stop = [0, *itertools.accumulate(ranks)][at : at + 2]
                own = lax.slice_in_dim(b, start, stop, axis=weight.sides.stack)
                set_adapter(adapted, weight, a[..., start:stop], own, 1.0)
        return adapted


def choose(model: Llama4, adapter_B: jax.Array) -> Llama4:
    """Say which adapter each row has, in a model that a program has for itself: its number, or 0. Returns that model."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, LowRank):
            module.adapter_B = adapter_B
    return model


def _copy(model: Llama4) -> Llama4:
    structure, leaves = take_apart(model)
    return structure(leaves)
