"""A plan: everything that is known about a case before anyone rents anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.plan import report
from maverick_jax.plan.case import Case
from maverick_jax.plan.memory import Memory, memory
from maverick_jax.plan.roofline import Cost, Prefill, decode, prefill
from maverick_jax.plan.room import largest_batch, largest_context, refusal
from maverick_jax.plan.search import candidates
from maverick_jax.plan.topology import Topology
from maverick_jax.sharding.layout import INFERENCE, Layout, get_layout
from maverick_jax.sharding.mesh import AXES as MESH_AXES

GPU_DEFAULT_SHARE = 0.75  # of a GPU's memory, jax's XLA_PYTHON_CLIENT_MEM_FRACTION


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a case costs; `str(plan)` is what `maverick plan` prints.

    Attributes:
      case: the question.
      mesh_chosen: the mesh was not given: it is the best of those that divide.
      memory: bytes per device.
      decode: one step of a full cache.
      prefill: reading the prompts.
      largest_batch, largest_context: what fits if the other stays (0: nothing does).
      curve: (batch, cost of a decode step) from 1 to the largest batch.
    """

    case: Case
    mesh_chosen: bool
    memory: Memory
    decode: Cost
    prefill: Prefill
    largest_batch: int
    largest_context: int
    curve: tuple[tuple[int, Cost], ...]

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def refusal(self) -> str:
        """One line for a plan that does not fit: by how much, and what would."""
        return refusal(self.case, mesh_chosen=self.mesh_chosen)

    @property
    def notes(self) -> list[str]:
        """What a reader must know beside the numbers."""
        case, found = self.case, []
        if case.batch % case.row_ways:
            found.append(
                f"batch {case.batch} is no multiple of {case.row_ways}: devices share rows, and each row's cache lies on "
                f"{case.sequence_ways(case.batch)} by its sequence."
            )
        if case.topology.chip.is_gpu and self.memory.needed > GPU_DEFAULT_SHARE * self.memory.capacity:
            found.append("jax takes 75 % of a GPU's memory by default: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.94.")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return report.as_dict(self)

    def __str__(self) -> str:
        return report.as_text(self)


def make_plan(
    config: Config,
    *,
    topology: str,
    mesh: Mapping[str, int] | None = None,
    layout: str | Layout | Mapping[str, str | tuple[str, ...]] | None = None,
    dtype: str = "bfloat16",
    batch: int = 64,
    context: int = 8192,
) -> Plan:
    """Plan a model on devices that need not be there.

    Args:
      topology: such as "v6e:8x8" or "h100:8".
      mesh: devices on the axes data, expert and tensor; an axis left out is 1. None: the fastest mesh that fits.
      layout: as for `load`.
      dtype: "bfloat16", "float32", or for routed experts in 8 or 4 bits and the rest in bfloat16 "fp8", "int8" (a scale per
        output channel) or "int4" (a scale per 128 inputs of an output channel).
      batch, context: rows, and tokens that each has room for.

    Returns:
      A plan, also of what does not fit: see `Plan.fits` and `Plan.refusal`.

    Raises:
      UserError: an unknown topology or dtype, a mesh that does not divide or lacks an axis of the layout.
    """
    where, table = Topology.parse(topology), get_layout(layout)
    if mesh is None:
        case = candidates(config, where, [table], dtype, batch, context)[0].case
    else:
        if unknown := set(mesh) - set(MESH_AXES):
            raise UserError(f"mesh axis {sorted(unknown)[0]!r} is unknown: the axes are {', '.join(MESH_AXES)}.")
        case = Case(config, where, tuple(mesh.get(axis, 1) for axis in MESH_AXES), table, dtype, batch, context)
    return _plan(case, mesh_chosen=mesh is None)


def search(
    config: Config,
    *,
    topology: str,
    layout: str | None = None,
    dtype: str = "bfloat16",
    batch: int = 64,
    context: int = 8192,
    best: int = 8,
) -> list[Plan]:
    """The fastest meshes that fit, in one layout or (None) in all; if none fits, the one that lacks least.

    Arguments as for `make_plan`.
    """
    layouts = list(INFERENCE) if layout is None else [get_layout(layout)]
    found = candidates(config, Topology.parse(topology), layouts, dtype, batch, context)
    fitting = [candidate for candidate in found if candidate.fits] or found[:1]
    return [_plan(candidate.case, mesh_chosen=True) for candidate in fitting[:best]]


def _plan(case: Case, *, mesh_chosen: bool) -> Plan:
    most = largest_batch(case)
    batches = sorted({2**i for i in range(most.bit_length())} | ({most} if most else set()))
    curve = tuple((batch, decode(dataclasses.replace(case, batch=batch))) for batch in batches)
    return Plan(case, mesh_chosen, memory(case), decode(case), prefill(case), most, largest_context(case), curve)
