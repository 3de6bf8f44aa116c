"""How many rows and how long ones a step of training leaves room for, and what would make one fit that does not."""

from __future__ import annotations

import contextlib
import dataclasses

from maverick_jax.errors import UserError
from maverick_jax.plan.case import MOST_ROWS
from maverick_jax.plan.room import NARROW, STEP, largest, too_much
from maverick_jax.plan.topology import Topology
from maverick_jax.plan.training.memory import memory
from maverick_jax.plan.training.recipe import Training
from maverick_jax.plan.training.search import Candidate, candidates


def largest_batch(training: Training) -> int:
    """The most rows of a micro-batch that fit: a multiple of the devices that divide them, or 0."""
    ways = training.case.row_ways
    return ways * largest(lambda rows: memory(training.with_rows(rows * ways)).fits, MOST_ROWS // ways)


def largest_length(training: Training) -> int:
    """The most tokens of a row that fit: the model's own, else a multiple of 1,024, or 0."""
    longest = training.case.config.text.max_position_embeddings
    if memory(training.with_length(longest)).fits:
        return longest
    return STEP * largest(lambda steps: memory(training.with_length(steps * STEP)).fits, longest // STEP)


def refusal(training: Training, *, mesh_chosen: bool) -> str:
    """One line for what does not fit: by how much, and each single change that suffices."""
    cures = _cures(training, mesh_chosen)
    what = f"what would fit: {', or '.join(cures)}." if cures else "no single change of mesh, dtype, rows, length or topology suffices."
    return f"{too_much(training.case, memory(training))}; {what}"


def _cures(training: Training, mesh_chosen: bool) -> list[str]:
    case, recipe = training.case, training.recipe
    found = []
    best = _best(training)
    if not mesh_chosen and best is not None:
        found.append(f"--mesh {best.training.case.mesh_name}")
    if recipe.remat != "layers" and _fits(dataclasses.replace(training, recipe=dataclasses.replace(recipe, remat="layers")), mesh_chosen):
        found.append("--remat layers")
    if recipe.adapts:
        for dtype in NARROW:
            other = dataclasses.replace(case, dtype=dtype)
            if other.weight_total < case.weight_total and _fits(dataclasses.replace(training, case=other), mesh_chosen):
                found.append(f"--dtype {dtype}")
                break
    if rows := largest_batch(training):
        found.append(f"--batch {rows}")
    if length := largest_length(training):
        found.append(f"--length {length}")
    for topology in case.topology.larger():
        best = _best(training, topology)
        if best is not None:
            found.append(f"--topology {topology.name}" + ("" if mesh_chosen else f" --mesh {best.training.case.mesh_name}"))
            break
    return found


def _fits(training: Training, mesh_chosen: bool) -> bool:
    return _best(training) is not None if mesh_chosen else memory(training).fits


def _best(training: Training, topology: Topology | None = None) -> Candidate | None:
    """The best mesh, if it fits, for as many rows."""
    case = training.case
    with contextlib.suppress(UserError):  # no mesh divides the model and the rows
        where = topology or case.topology
        best = candidates(case.config, where, case.layout, case.dtype, case.batch, case.context, training.recipe)[0]
        return best if best.fits else None
    return None
