"""Layouts: the table from logical axes, which parameters and activations carry, to mesh axes.

Nothing else in the project knows both sides.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from maverick_jax.config import Config
from maverick_jax.config.checks import show
from maverick_jax.errors import UserError

Axes = tuple[str | None, ...]
MOST_SHARES = 256  # an error lists divisors up to here
# The logical axes: of weights, those of one weight together, and of activations.
WEIGHTS = (
    ("vocab", "table_embed"),
    ("embed", "heads"),
    ("embed", "kv_heads"),
    ("embed", "mlp"),
    ("expert", "expert_embed", "expert_mlp"),
    ("vision_output", "embed"),
    ("vision_embed", "vision_heads"),
    ("vision_embed", "vision_mlp"),
)
ACTIVATIONS = ("batch", "sequence", "tokens", "tiles", "attention_batch", "attention_sequence")
LOGICAL_AXES = tuple(dict.fromkeys((*ACTIVATIONS, *itertools.chain(*WEIGHTS))))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A table from logical axis to the mesh axes that divide it; a logical axis without a row is not divided.

    Raises:
      UserError: a row of no logical axis; a mesh axis twice in a row, or in two rows that divide one weight.
    """

    name: str
    rows: tuple[tuple[str, tuple[str, ...]], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.rows, tuple) or not all(isinstance(row, tuple) and len(row) == 2 for row in self.rows):
            raise UserError(f"layout {self.name!r} has rows {show(self.rows)}: make it by Layout.from_table(name, table).")
        for axis, to in self.rows:
            if axis not in LOGICAL_AXES:
                close = difflib.get_close_matches(str(axis), LOGICAL_AXES, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(LOGICAL_AXES)}."
                raise UserError(f"layout {self.name!r} has a row {axis!r}, which is no logical axis: {hint}")
            if not isinstance(to, tuple) or not all(isinstance(name, str) for name in to):
                raise UserError(f"layout {self.name!r} puts {axis!r} on {to!r}: give the name of a mesh axis, or several in a tuple.")
            if twice := [name for place, name in enumerate(to) if name in to[:place]]:
                raise UserError(f"layout {self.name!r} puts {axis!r} on mesh axis {twice[0]!r} twice: once divides it.")
        if twice := [axis for place, (axis, _) in enumerate(self.rows) if axis in dict(self.rows[:place])]:
            raise UserError(f"layout {self.name!r} has two rows {twice[0]!r}: keep one.")
        for one, other in (pair for axes in WEIGHTS for pair in itertools.combinations(axes, 2)):
            if shared := set(self.mesh_axes(one)) & set(self.mesh_axes(other)):
                raise UserError(
                    f"layout {self.name!r} puts {one!r} and {other!r} on mesh axis {min(shared)!r}, but they are axes of one weight, of "
                    "which it divides one: give them mesh axes of their own."
                )

    @classmethod
    def from_table(cls, name: str, table: Mapping[str, str | Sequence[str]]) -> Layout:
        """A layout from a readable dict, such as `{"expert": "expert", "tokens": ("data", "expert")}`."""
        several = {axis: tuple(to) if isinstance(to, list) else to for axis, to in table.items()}
        return cls(name, tuple((axis, (to,) if isinstance(to, str) else to) for axis, to in several.items()))

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        assert axis is None or axis in LOGICAL_AXES, axis
        return dict(self.rows).get(axis, ()) if axis else ()

    def split(self, axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> list[tuple[str, ...]]:
        """The mesh axes that divide each axis of an array.

        From left to right every axis takes the mesh axes of its row that are still free, as many of them, from the first,
        as divide its size. So a batch of one leaves its mesh axes to the sequence, and what nothing divides stays whole.
        """
        taken: set[str] = set()
        entries = []
        for axis, size in zip(axes, shape, strict=True):
            entries.append(self._divisors(axis, size, mesh, taken))
            taken |= set(entries[-1])
        return entries

    def spec(self, axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
        """Partition of an array with these logical axes, by `split`."""
        return PartitionSpec(*(used if len(used) > 1 else used[0] if used else None for used in self.split(axes, shape, mesh)))

    def _divisors(self, axis: str | None, size: int, mesh: Mesh | AbstractMesh, taken: set[str]) -> tuple[str, ...]:
        used: tuple[str, ...] = ()
        for name in self.mesh_axes(axis):
            if name in taken:
                continue
            if size % (mesh.shape[name] * math.prod(mesh.shape[other] for other in used)):
                break
            used = (*used, name)
        return used

    def sharding(self, axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
        return NamedSharding(mesh, self.spec(axes, shape, mesh))

    def check_axes(self, mesh_axes: Sequence[str]) -> None:
        """Refuse a row that names a mesh axis which there is not."""
        for axis, to in self.rows:
            for name in to:
                if name not in mesh_axes:
                    raise UserError(f"layout {self.name!r} puts {axis!r} on mesh axis {name!r}, but the mesh has {tuple(mesh_axes)}.")

    def check(self, config: Config, mesh: Mesh | AbstractMesh) -> None:
        """Refuse a mesh that does not divide what must be divided, or that lacks an axis of this table.

        Raises:
          UserError: names the axis, its size, and what it does not divide.
        """
        self.check_axes(mesh.axis_names)
        text = config.text
        sizes = {
            "heads": (text.num_attention_heads, "attention heads"),
            "kv_heads": (text.num_key_value_heads, "key/value heads"),
            "mlp": (text.intermediate_size_mlp, "columns of a dense layer"),
        }
        if text.moe_layers:
            sizes["expert"] = (text.num_local_experts, "experts")
            sizes["expert_mlp"] = (text.intermediate_size, "columns of an expert")
        for axis, (size, what) in sizes.items():
            devices = math.prod(mesh.shape[a] for a in self.mesh_axes(axis))
            if size % devices:
                on = " x ".join(self.mesh_axes(axis))
                good = [n for n in range(1, min(size, MOST_SHARES) + 1) if size % n == 0]
                raise UserError(f"mesh axis {on} = {devices} does not divide the {size} {what}: choose one of {good}.")


_TENSOR_PARALLEL = {
    "heads": "tensor",
    "kv_heads": "tensor",
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
    "tiles": ("data", "expert"),
    "attention_batch": ("data", "expert"),
    "attention_sequence": ("data", "expert"),  # of a batch too small for these axes: context parallelism
}

# Tokens over data x expert, whole experts over expert; heads and widths over tensor.
THROUGHPUT = Layout.from_table(
    "throughput",
    {
        **_TENSOR_PARALLEL,
        "batch": ("data", "expert"),
        "sequence": ("data", "expert"),
        "tokens": ("data", "expert"),
        "expert": "expert",
        "expert_mlp": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
    },
)
# Every matrix over tensor, and what is wide enough over expert too: each device works on every token, whichever expert it
# needs. Attention, whose heads end at tensor, divides rows or the cache's sequence over expert.
LATENCY = Layout.from_table(
    "latency",
    {
        **_TENSOR_PARALLEL,
        "batch": "data",
        "tokens": "data",
        "sequence": "data",
        "expert_mlp": ("expert", "tensor"),
        "mlp": ("expert", "tensor"),
        "vocab": ("expert", "tensor"),
    },
)
# As throughput, with parameters and optimizer state over all devices: a part of every matrix's model width, gathered where it is used.
# Embedding and unembedding have whole vocabularies, so that a token's row is looked up, and its logits are made, without another device.
TRAINING = Layout.from_table(
    "training",
    {
        **{axis: to for axis, to in THROUGHPUT.rows if axis != "vocab"},
        "embed": ("data", "expert"),
        "table_embed": ("data", "expert"),
        "expert_embed": "data",
        "vision_embed": ("data", "expert"),
    },
)

INFERENCE = (THROUGHPUT, LATENCY)
LAYOUTS = {layout.name: layout for layout in (THROUGHPUT, LATENCY, TRAINING)}


def get_layout(layout: str | Layout | Mapping[str, str | Sequence[str]] | None) -> Layout:
    """A layout by name, from a table, or the default (`throughput`) for None.

    Raises:
      UserError: an unknown name, or a table that means nothing (see `Layout`).
    """
    if layout is None:
        return THROUGHPUT
    if isinstance(layout, Layout):
        return layout
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise UserError(f"layout {layout!r} is unknown: choose one of {', '.join(LAYOUTS)}, or pass a table.")
        return LAYOUTS[layout]
    if not isinstance(layout, Mapping):
        raise UserError(f"layout {layout!r} is neither a name nor a table: choose one of {', '.join(LAYOUTS)}, or pass a dict.")
    return Layout.from_table("custom", layout)


def check_mesh(mesh: Any) -> None:
    """Refuse what is no mesh, or one whose axes jax does not divide by itself: `shard_map` takes no input that says nothing of them."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise UserError(f"mesh is {show(mesh)}: it must be a jax.sharding.Mesh, which make_mesh gives.")
    if isinstance(mesh, Mesh) and any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise UserError(f"the mesh has axes of other types than AxisType.Auto ({show(mesh.axis_types)}): make it by make_mesh.")


def check_placed(mesh: Any, layout: Any) -> None:
    """Refuse what is no mesh or no layout, in whatever lies on a mesh by a layout."""
    check_mesh(mesh)
    if not isinstance(layout, Layout):
        raise UserError(f"layout is {show(layout)}: it must be a Layout, which get_layout gives.")


@dataclasses.dataclass(frozen=True)
class Constrain:
    """Pins an activation to the layout: `constrain(x, ("batch", None, "heads", None))`."""

    mesh: Mesh
    layout: Layout

    def __post_init__(self) -> None:
        check_placed(self.mesh, self.layout)

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def sharding(self, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
        """Where an array with these axes lies."""
        return self.layout.sharding(axes, shape, self.mesh)
