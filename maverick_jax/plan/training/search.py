"""Which meshes a topology allows for training, and which of them is fastest."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.plan.case import Case
from maverick_jax.plan.search import mesh_shapes
from maverick_jax.plan.topology import Topology
from maverick_jax.plan.training.memory import memory
from maverick_jax.plan.training.recipe import Recipe, Training
from maverick_jax.plan.training.roofline import step
from maverick_jax.sharding.layout import Layout


class Candidate(NamedTuple):
    """A step and how it compares: what fits by its time per token, what does not by how much is missing."""

    training: Training
    fits: bool
    per_token: float
    serial: float
    free: int

    @property
    def rank(self) -> tuple:
        return (0, self.per_token, self.serial, -self.free) if self.fits else (1, -self.free)


def make_training(
    config: Config, topology: Topology, mesh: tuple[int, ...], layout: Layout, dtype: str, rows: int | None, length: int, recipe: Recipe
) -> Training:
    """On this mesh; without a number of rows one for each share of the devices."""
    case = Case(config, topology, mesh, layout, dtype, 1 if rows is None else rows, length)
    return Training(dataclasses.replace(case, batch=case.row_ways) if rows is None else case, recipe)


def candidates(
    config: Config, topology: Topology, layout: Layout, dtype: str, rows: int | None, length: int, recipe: Recipe
) -> list[Candidate]:
    """Every mesh that divides the model and the rows, the best first.

    Raises:
      UserError: what is wrong with every mesh.
    """
    found, refusal = [], None
    for shape in mesh_shapes(topology.devices):
        try:
            training = make_training(config, topology, shape, layout, dtype, rows, length, recipe)
        except UserError as error:
            refusal = error
            continue
        held, cost = memory(training), step(training)
        found.append(Candidate(training, held.fits, cost.step / training.tokens, cost.serial / training.tokens, held.free))
    if not found:
        assert refusal is not None
        raise refusal
    return sorted(found, key=lambda candidate: candidate.rank)
