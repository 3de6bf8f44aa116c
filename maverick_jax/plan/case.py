"""One question: this model, on this mesh of these chips, in this dtype, with so many rows of so many tokens.

What a device holds follows from the layout table alone: every size here comes from `Layout.sharding`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import NamedTuple, cast

from jax.sharding import AbstractMesh, Mesh

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.inference.cache import page_size
from maverick_jax.inference.checks import Range, whole
from maverick_jax.model.parameter import Axes
from maverick_jax.plan.topology import Topology
from maverick_jax.plan.weights import COMPONENTS, Kind, check_dtype, parameters, stored
from maverick_jax.sharding.attend import KEYS, PAGES
from maverick_jax.sharding.layout import Layout
from maverick_jax.sharding.mesh import AXES as MESH_AXES
from maverick_jax.sharding.mesh import divide_axes

MOST_ROWS = 2**20
BATCH = Range(whole, 1, MOST_ROWS, f"a whole number, 1 to {MOST_ROWS:,} rows")


class Ways(NamedTuple):
    """Devices that share something: those of one host, and hosts."""

    inside: int
    across: int

    @property
    def total(self) -> int:
        return self.inside * self.across


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything that a plan depends on.

    Attributes:
      mesh_shape: devices on the axes data, expert and tensor.
      batch: rows; each holds `context` tokens.

    Raises:
      UserError: the mesh has another number of devices than the topology or does not divide the model; batch or context
        out of range; an unknown dtype; a layout that names an axis the mesh lacks.
    """

    config: Config
    topology: Topology
    mesh_shape: tuple[int, ...]
    layout: Layout
    dtype: str
    batch: int
    context: int

    def __post_init__(self):
        check_dtype(self.dtype)
        longest = self.config.text.max_position_embeddings
        context = Range(whole, 1, longest, f"a whole number, 1 to {longest:,} tokens of this model")
        for name, allowed in (("batch", BATCH), ("context", context)):
            object.__setattr__(self, name, allowed.check(name, getattr(self, name)))
        devices = math.prod(self.mesh_shape)
        if devices != self.topology.devices:
            raise UserError(
                f"the mesh {self.mesh_name} has {devices} devices, {self.topology.name} has {self.topology.devices}: make them equal."
            )
        self.layout.check(self.config, self.mesh)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """A mesh without devices: a layout asks only for its shape."""
        return cast(Mesh, AbstractMesh(self.mesh_shape, MESH_AXES))

    @property
    def mesh_name(self) -> str:
        """As `--mesh` takes it; axes of one device are left out."""
        sizes = [f"{axis}={size}" for axis, size in zip(MESH_AXES, self.mesh_shape, strict=True) if size > 1]
        return ",".join(sizes or ["data=1"])

    def local(self, axes: Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What one device holds of an array with these logical axes."""
        return self.layout.sharding(axes, shape, self.mesh).shard_shape(shape)

    def ways(self, axis: str | None) -> int:
        """Devices among which a logical axis is divided if its size allows."""
        return math.prod(self.mesh.shape[name] for name in self.layout.mesh_axes(axis))

    def split(self, axis: str, size: int) -> set[str]:
        """The mesh axes that divide a logical axis of this size."""
        return set(self.layout.split((axis,), (size,), self.mesh)[0])

    @functools.cached_property
    def split_pages(self) -> set[str]:
        """The mesh axes that divide every page of the cache."""
        text = self.config.text
        shape = (1, text.num_key_value_heads, page_size(text, self.context), text.head_dim)
        return set(self.layout.split(PAGES, shape, self.mesh)[2])

    def among(self, mesh_axes: Iterable[str]) -> Ways:
        """Devices along these mesh axes. Between hosts lie the first axes, as far as they divide the hosts (`divide_axes`)."""
        inside, across = divide_axes(self.mesh_shape, self.topology.hosts)
        places = [MESH_AXES.index(name) for name in mesh_axes]
        return Ways(math.prod(inside[place] for place in places), math.prod(across[place] for place in places))

    @functools.cached_property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes per device of every component, in the order of `COMPONENTS`."""
        return self.bytes_of(stored(self.config, self.dtype))

    def bytes_of(self, kinds: Iterable[Kind]) -> dict[str, int]:
        """Bytes per device of what there is of these leaves in every component, in the order of `COMPONENTS`."""
        found = dict.fromkeys(COMPONENTS, 0)
        for kind in kinds:
            found[kind.component] += math.prod(self.local(kind.axes, kind.shape)) * kind.itemsize * kind.number
        return {part: size for part, size in found.items() if size}

    @property
    def parameter_count(self) -> int:
        return sum(math.prod(shape) * count for (_, _, shape), count in parameters(self.config).items())

    @functools.cached_property
    def weight_total(self) -> int:
        """Bytes of the whole model, every parameter counted once."""
        return sum(math.prod(shape) * size * count for _, _, shape, size, count in stored(self.config, self.dtype))

    @functools.cached_property
    def matrix_elements(self) -> dict[str, int]:
        """Elements per device of every component's matrices, which is what products are made of."""
        found: dict[str, int] = {}
        for (part, axes, shape), count in parameters(self.config).items():
            if len(shape) > 1:
                found[part] = found.get(part, 0) + math.prod(self.local(axes, shape)) * count
        return found

    @property
    def row_ways(self) -> int:
        """A batch is divided among devices only if it is a multiple of this."""
        return max(self.ways("batch"), self.ways(KEYS[0]))
