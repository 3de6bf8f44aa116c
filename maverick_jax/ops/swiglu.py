"""SwiGLU feed-forward, dense and grouped by expert: `down(silu(gate(x)) * up(x))`."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maverick_jax.ops.grouped_matmul import grouped_matmul
from maverick_jax.ops.linear import AdaptedWeight, LowRankArray, base_of, linear, linear_float32
from maverick_jax.ops.quantize import matrix_shape


class ExpertWeights(NamedTuple):
    """The routed experts of one layer. Shapes: E experts, D model width, F feed-forward width, B rows of a batch, T tokens.

    Where rows have adapters of their own, what travels with a token is one number for both: expert * ways + adapter.
    """

    gate_EDF: AdaptedWeight
    up_EDF: AdaptedWeight
    down_EFD: AdaptedWeight

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, D and F."""
        E, D, F = matrix_shape(base_of(self.gate_EDF))
        return E, D, F

    @property
    def ways(self) -> int:
        """One, and one more for each of several adapters."""
        return 1 + max((len(weight.ranks) for weight in self if isinstance(weight, LowRankArray)), default=0)

    @property
    def numbers(self) -> int:
        """How many a token may have; this one marks padding."""
        return self.shape[0] * self.ways

    def numbered(self, expert_T: jax.Array) -> tuple[jax.Array, ExpertWeights]:
        """The numbers of tokens, equally many of each of the batch's rows; and the weights for those who see numbers alone."""
        if self.ways == 1:
            return expert_T, self
        adapter_B = next(weight.adapter_B for weight in self if isinstance(weight, LowRankArray) and weight.adapter_B is not None)
        adapter_T = jnp.repeat(adapter_B, len(expert_T) // len(adapter_B))
        return jnp.minimum(expert_T * self.ways + adapter_T, self.numbers), self._of_rows(None)

    def expert_of(self, number_T: jax.Array) -> jax.Array:
        """E of padding."""
        return number_T if self.ways == 1 else number_T // self.ways

    def of_rows(self, number_R: jax.Array, order: jax.Array) -> ExpertWeights:
        """The weights for rows with these numbers, in this order."""
        return self if self.ways == 1 else self._of_rows(number_R[order] % self.ways)

    def _of_rows(self, adapter_R: jax.Array | None) -> ExpertWeights:
        return ExpertWeights(
            *(dataclasses.replace(weight, adapter_B=adapter_R) if isinstance(weight, LowRankArray) else weight for weight in self)
        )


def swiglu(x: jax.Array, gate_DF: AdaptedWeight, up_DF: AdaptedWeight, down_FD: AdaptedWeight) -> jax.Array:
    """x: [..., D] -> [..., D] float32."""
    return linear_float32(jax.nn.silu(linear(x, gate_DF)) * linear(x, up_DF), down_FD)


def grouped_swiglu(x_RD: jax.Array, experts: ExpertWeights, group_sizes_E: jax.Array) -> jax.Array:
    """x_RD: rows sorted by expert -> [R, D]; rows beyond the groups give zero."""
    gate = grouped_matmul(x_RD, experts.gate_EDF, group_sizes_E)
    up = grouped_matmul(x_RD, experts.up_EDF, group_sizes_E)
    return grouped_matmul(jax.nn.silu(gate) * up, experts.down_EFD, group_sizes_E)
