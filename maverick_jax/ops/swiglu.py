"""SwiGLU feed-forward, dense and grouped by expert: `down(silu(gate(x)) * up(x))`."""

from typing import NamedTuple

import jax

from maverick_jax.ops.grouped_matmul import grouped_matmul
from maverick_jax.ops.linear import AdaptedWeight, base_of, linear, linear_float32
from maverick_jax.ops.quantize import matrix_shape


class ExpertWeights(NamedTuple):
    """The routed experts of one layer. Shapes: E experts, D model width, F feed-forward width."""

    gate_EDF: AdaptedWeight
    up_EDF: AdaptedWeight
    down_EFD: AdaptedWeight

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, D and F."""
        E, D, F = matrix_shape(base_of(self.gate_EDF))
        return E, D, F


def swiglu(x: jax.Array, gate_DF: AdaptedWeight, up_DF: AdaptedWeight, down_FD: AdaptedWeight) -> jax.Array:
    """x: [..., D] -> [..., D] float32."""
    return linear_float32(jax.nn.silu(linear(x, gate_DF)) * linear(x, up_DF), down_FD)


def grouped_swiglu(x_RD: jax.Array, experts: ExpertWeights, group_sizes_E: jax.Array) -> jax.Array:
    """x_RD: rows sorted by expert -> [R, D]; rows beyond the groups give zero."""
    gate = grouped_matmul(x_RD, experts.gate_EDF, group_sizes_E)
    up = grouped_matmul(x_RD, experts.up_EDF, group_sizes_E)
    return grouped_matmul(jax.nn.silu(gate) * up, experts.down_EFD, group_sizes_E)
