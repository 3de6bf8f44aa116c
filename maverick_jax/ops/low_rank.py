"""A weight and what was learned beside it, the product of two thin matrices (LoRA): `base + scale * a b`, never added up.

Shape suffixes: R rows, E experts, K inputs, N outputs, r rank.
Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import dataclasses

import jax

from maverick_jax.ops.quantize import Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankArray:
    """An adapted weight on its way through a computation.

    Attributes:
      base: [*E, *K, *N], or quantized.
      a: [*E, *K, r] in any float dtype; products take it in that of the activations.
      b: [*E, r, *N].
    """

    base: Weight
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})


AdaptedWeight = Weight | LowRankArray


def base_of(weight: AdaptedWeight) -> Weight:
    """What was there before anything was learned."""
    return weight.base if isinstance(weight, LowRankArray) else weight
