"""Where a mixture's tokens and experts lie on a mesh, and the `shard_map` around what each device does with them.

Shape suffixes: T all tokens, L tokens of one device, D model width, F expert width, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from maverick_jax.errors import UserError
from maverick_jax.ops.linear import AdaptedWeight, LowRankArray
from maverick_jax.ops.quantize import QuantizedArray
from maverick_jax.ops.swiglu import ExpertWeights
from maverick_jax.sharding.layout import Layout

OnDevice = Callable[[jax.Array, jax.Array, ExpertWeights], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Mesh axes that divide the experts, their inputs, their width, and the tokens.

    Attributes:
      expert_axes, embed_axes, width_axes: as the layout divides `gate_EDF`. What `embed_axes` divide is stored so, and gathered for use.
      token_axes: of the layout's `tokens`; none of `width_axes`, whose devices each add a part to the same tokens.
    """

    mesh: Mesh
    expert_axes: tuple[str, ...]
    embed_axes: tuple[str, ...]
    width_axes: tuple[str, ...]
    token_axes: tuple[str, ...]

    @classmethod
    def of(cls, mesh: Mesh, layout: Layout, experts: ExpertWeights) -> Placement:
        expert_axes, embed_axes, width_axes = layout.split(("expert", "expert_embed", "expert_mlp"), experts.shape, mesh)
        return cls(mesh, expert_axes, embed_axes, width_axes, tuple(a for a in layout.mesh_axes("tokens") if a not in width_axes))

    @property
    def gathered_token_axes(self) -> tuple[str, ...]:
        """All devices of the expert axes look at the same tokens."""
        return tuple(a for a in self.token_axes if a not in self.expert_axes)

    @property
    def split_token_axes(self) -> tuple[str, ...]:
        """Every device of the expert axes brings tokens of its own, also where the layout keeps copies on them."""
        return self.token_axes + tuple(a for a in self.expert_axes if a not in self.token_axes)

    def size(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[a] for a in axes)

    @staticmethod
    def sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        return lax.psum(x, axes) if axes else x

    def run(
        self, on_device: OnDevice, x_TD: jax.Array, expert_T: jax.Array, experts: ExpertWeights, *, token_axes: tuple[str, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """`on_device(x_LD, expert_L, experts) -> (y_LD, dropped)` on every device, tokens divided over `token_axes`.

        Tokens that the devices do not share evenly, perhaps fewer than devices, are padded. `dropped` is summed over the
        token axes.
        """
        T, E = x_TD.shape[0], experts.numbers
        missing = -T % self.size(token_axes)
        if missing:
            x_TD = jnp.pad(x_TD, ((0, missing), (0, 0)))
            expert_T = jnp.pad(expert_T, (0, missing), constant_values=E)
        tokens = PartitionSpec(token_axes)
        gate, up, down = experts
        of_gate, of_up = (self._specs(w, self.embed_axes, self.width_axes) for w in (gate, up))
        weights = ExpertWeights(of_gate, of_up, self._specs(down, self.width_axes, self.embed_axes))

        def body(x_LD: jax.Array, expert_L: jax.Array, experts: ExpertWeights) -> tuple[jax.Array, jax.Array]:
            y_LD, dropped = on_device(x_LD, expert_L, jax.tree.map(functools.partial(gather, over=self.embed_axes), experts, weights))
            return y_LD, self.sum(dropped, token_axes)

        y_TD, dropped = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(tokens, tokens, weights),
            out_specs=(tokens, PartitionSpec()),
            check_vma=False,  # the CPU grouped matmul's loops carry zeros that vary over no axis
        )(x_TD, expert_T, experts)
        return y_TD[:T], dropped

    def _specs(self, weight_EKN: AdaptedWeight, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Any:
        """How a stack is divided: scales of groups of inputs with the inputs, one scale for all inputs not; thin matrices but for rank.

        Inputs that are gathered stay whole where they cannot be divided; of a width, each device needs the scales of its own part.
        """
        if isinstance(weight_EKN, LowRankArray):
            a, b = PartitionSpec(self.expert_axes, inputs, None), PartitionSpec(self.expert_axes, None, outputs)
            return dataclasses.replace(weight_EKN, base=self._specs(weight_EKN.base, inputs, outputs), a=a, b=b)
        if not isinstance(weight_EKN, QuantizedArray):
            return PartitionSpec(self.expert_axes, inputs, outputs)
        rows, groups, ways = weight_EKN.values.shape[1], weight_EKN.scales.shape[1], self.size(inputs)
        if inputs == self.width_axes and (rows if groups == 1 else groups) % ways:
            what = f"{rows} packed rows" if groups == 1 else f"{groups} groups of inputs that share a scale"
            raise UserError(
                f"{' x '.join(inputs)} = {ways} devices divide the width of every expert, but not the {what} of its quantized matrix: "
                "take a mesh with fewer of these devices, or a layout that divides whole experts."
            )
        values, scales = (PartitionSpec(self.expert_axes, None if size == 1 or size % ways else inputs, outputs) for size in (rows, groups))
        return dataclasses.replace(weight_EKN, values=values, scales=scales)


def gather(array: jax.Array, spec: PartitionSpec, over: tuple[str, ...] | None = None) -> jax.Array:
    """Inside `shard_map`: the whole array, of which a device has the part that `spec` says. What each device makes of it, its gradient,
    is summed and divided in one step, a reduce-scatter.

    Args:
      over: mesh axes whose parts are put together; None: all.
    """
    for axis, names in enumerate(spec):
        names = (names,) if isinstance(names, str) else tuple(names or ())
        if names and (over is None or names == over):
            array = lax.all_gather(array, names, axis=axis, tiled=True)
    return array
