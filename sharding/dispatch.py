"""Dispatchers move tokens to their experts and bring the results back. `Local`: everything on one device.

Shape suffixes: T tokens, D model width, E experts.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from maverick_jax.ops.swiglu import ExpertWeights, grouped_swiglu


class Stats(NamedTuple):
    """What a dispatch did: tokens that found no room (always 0 at inference) and tokens per expert."""

    dropped: jax.Array  # [] int32
    load_E: jax.Array  # [E] int32


class Dispatcher(Protocol):
    """`dispatcher(x_TD, expert_T, experts) -> (y_TD, stats)`: each token through its expert's SwiGLU.

    `expert_T` is int32; the value E (one past the last expert) marks padding, whose result is zero and which travels
    nowhere. All dispatchers give the dense sum over experts, forward and gradient.
    """

    def __call__(self, x_TD: jax.Array, expert_T: jax.Array, experts: ExpertWeights) -> tuple[jax.Array, Stats]: ...


@dataclasses.dataclass(frozen=True)
class Local:
    """All experts on this device: sort by expert, one grouped matmul, sort back."""

    def __call__(self, x_TD: jax.Array, expert_T: jax.Array, experts: ExpertWeights) -> tuple[jax.Array, Stats]:
        y_TD, load_E = run_experts(x_TD, expert_T, experts)
        return y_TD, Stats(jnp.zeros((), jnp.int32), load_E)


def run_experts(x_RD: jax.Array, expert_R: jax.Array, experts: ExpertWeights) -> tuple[jax.Array, jax.Array]:
    """Rows in any order through their experts, on one device.

    Args:
      expert_R: int32 in 0..E; E marks rows without an expert.

    Returns:
      [R, D] results in the rows' order (zero without an expert) and [E] rows per expert.
    """
    load_E = jnp.bincount(expert_R, length=experts.gate_EDF.shape[0]).astype(jnp.int32)
    order = jnp.argsort(expert_R)  # stable; padding sorts behind the last expert
    y_sorted = grouped_swiglu(x_RD[order], experts, load_E)
    return y_sorted[jnp.argsort(order)], load_E
