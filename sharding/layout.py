"""Layouts: the table from logical axes, which parameters and activations carry, to mesh axes.

Nothing else in the project knows both sides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maverick_jax.config import Config
from maverick_jax.errors import UserError

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A table from logical axis to the mesh axes that divide it; a logical axis without a row is not divided."""

    name: str
    rows: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def from_table(cls, name: str, table: Mapping[str, str | tuple[str, ...]]) -> Layout:
        """A layout from a readable dict, such as `{"expert": "expert", "tokens": ("data", "expert")}`."""
        return cls(name, tuple((axis, (to,) if isinstance(to, str) else tuple(to)) for axis, to in table.items()))

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        return dict(self.rows).get(axis, ()) if axis else ()

    def spec(self, axes: Axes, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        """Partition of an array with these logical axes. An axis that the mesh does not divide stays whole."""
        entries = []
        for axis, size in zip(axes, shape, strict=True):
            to = self.mesh_axes(axis)
            entries.append((to if len(to) > 1 else to[0]) if to and size % math.prod(mesh.shape[a] for a in to) == 0 else None)
        return PartitionSpec(*entries)

    def sharding(self, axes: Axes, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
        return NamedSharding(mesh, self.spec(axes, shape, mesh))

    def check(self, config: Config, mesh: Mesh) -> None:
        """Refuse a mesh that does not divide what must be divided, or that lacks an axis of this table.

        Raises:
          UserError: names the axis, its size, and what it does not divide.
        """
        for axis, to in self.rows:
            for name in to:
                if name not in mesh.shape:
                    raise UserError(f"layout {self.name!r} puts {axis!r} on mesh axis {name!r}, but the mesh has {tuple(mesh.shape)}.")
        text = config.text
        sizes = {"heads": text.num_attention_heads, "kv_heads": text.num_key_value_heads}
        if text.moe_layers:
            sizes["expert"] = text.num_local_experts
        for axis, size in sizes.items():
            devices = math.prod(mesh.shape[a] for a in self.mesh_axes(axis))
            if size % devices:
                on = " x ".join(self.mesh_axes(axis))
                good = [n for n in range(1, size + 1) if size % n == 0]
                what = {"expert": "experts", "heads": "attention heads", "kv_heads": "key/value heads"}[axis]
                raise UserError(f"mesh axis {on} = {devices} does not divide the {size} {what}: choose one of {good}.")


# Tokens over data x expert, whole experts over expert; heads and widths over tensor.
THROUGHPUT = Layout.from_table(
    "throughput",
    {
        # activations
        "batch": ("data", "expert"),
        "tokens": ("data", "expert"),
        # parameters, and the activations that carry their axes
        "expert": "expert",
        "expert_mlp": "tensor",
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
        "vision_heads": "tensor",
        "vision_mlp": "tensor",
        "tiles": ("data", "expert"),
    },
)
LAYOUTS = {layout.name: layout for layout in (THROUGHPUT,)}


def get_layout(layout: str | Layout | Mapping[str, str | tuple[str, ...]] | None) -> Layout:
    """A layout by name, from a table, or the default (`throughput`) for None."""
    if layout is None:
        return THROUGHPUT
    if isinstance(layout, Layout):
        return layout
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise UserError(f"layout {layout!r} is unknown: choose one of {', '.join(LAYOUTS)}, or pass a table.")
        return LAYOUTS[layout]
    return Layout.from_table("custom", layout)


@dataclasses.dataclass(frozen=True)
class Constrain:
    """Pins an activation to the layout: `constrain(x, ("batch", None, "heads", None))`."""

    mesh: Mesh
    layout: Layout

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, self.layout.sharding(axes, x.shape, self.mesh))
