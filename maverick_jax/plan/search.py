"""Which meshes a topology allows, and which of them is fastest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.plan.case import Case
from maverick_jax.plan.memory import memory
from maverick_jax.plan.roofline import decode
from maverick_jax.plan.topology import Topology
from maverick_jax.sharding.layout import Layout


class Candidate(NamedTuple):
    """A case and how it compares: what fits by its step, what does not by how much is missing."""

    case: Case
    fits: bool
    step: float
    serial: float
    free: int

    @property
    def rank(self) -> tuple:
        return (0, self.step, self.serial, -self.free) if self.fits else (1, -self.free)


def candidates(config: Config, topology: Topology, layouts: Iterable[Layout], dtype: str, batch: int, context: int) -> list[Candidate]:
    """Every mesh that divides the model, in every layout, the best first.

    Raises:
      UserError: what is wrong with every mesh, such as an unknown dtype.
    """
    found, refusal = [], None
    for layout in layouts:
        for shape in mesh_shapes(topology.devices):
            try:
                case = Case(config, topology, shape, layout, dtype, batch, context)
            except UserError as error:
                refusal = error
                continue
            held, cost = memory(case), decode(case)
            found.append(Candidate(case, held.fits, cost.step, cost.serial, held.free))
    if not found:
        assert refusal is not None
        raise refusal
    return sorted(found, key=lambda candidate: candidate.rank)


def mesh_shapes(devices: int) -> Iterator[tuple[int, int, int]]:
    """Every (data, expert, tensor) with that many devices."""
    for tensor in range(1, devices + 1):
        if devices % tensor == 0:
            rest = devices // tensor
            yield from ((rest // expert, expert, tensor) for expert in range(1, rest + 1) if rest % expert == 0)
