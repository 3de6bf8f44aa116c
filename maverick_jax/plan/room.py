"""How much batch and context a case leaves room for, and what would make one fit that does not."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

from maverick_jax.errors import UserError
from maverick_jax.plan.case import MOST_ROWS, Case
from maverick_jax.plan.chips import GIB
from maverick_jax.plan.memory import RESERVE, Held, memory
from maverick_jax.plan.search import candidates
from maverick_jax.sharding.layout import INFERENCE

STEP = 1024  # contexts are tried in multiples of this
NARROW = ("fp8", "int4")  # dtypes to try, the wider first


def largest_batch(case: Case) -> int:
    """The most rows that fit at this context: a multiple of the devices that divide them, or 0."""
    shares = MOST_ROWS // case.row_ways
    return case.row_ways * largest(lambda rows: memory(dataclasses.replace(case, batch=rows * case.row_ways)).fits, shares)


def largest_context(case: Case) -> int:
    """The longest context that fits at this batch: the model's own, else a multiple of 1,024, or 0."""
    longest = case.config.text.max_position_embeddings
    if memory(dataclasses.replace(case, context=longest)).fits:
        return longest
    return STEP * largest(lambda steps: memory(dataclasses.replace(case, context=steps * STEP)).fits, longest // STEP)


def largest(fits: Callable[[int], bool], upper: int) -> int:
    """The largest number up to `upper` that fits; 0 if 1 does not. What fits, fits with less."""
    lower = 0
    while lower < upper:
        middle = (lower + upper + 1) // 2
        lower, upper = (middle, upper) if fits(middle) else (lower, middle - 1)
    return lower


def refusal(case: Case, *, mesh_chosen: bool) -> str:
    """One line for a case that does not fit: by how much, and each single change that suffices.

    Args:
      mesh_chosen: the mesh is the best that was found, not the user's own.
    """
    cures = _cures(case, mesh_chosen)
    what = f"what would fit: {', or '.join(cures)}." if cures else "no single change of mesh, dtype, batch, context or topology suffices."
    return f"{too_much(case, memory(case))}; {what}"


def too_much(case: Case, held: Held) -> str:
    """What does not fit where, and by how much."""
    return (
        f"does not fit {case.topology.name} with mesh {case.mesh_name}, layout {case.layout.name}: a device needs "
        f"{held.needed / GIB:.1f} GiB, {-held.free / GIB:.1f} GiB more than the {held.usable / GIB:.1f} it can use "
        f"({case.topology.chip.memory / GIB:.0f} less {RESERVE:.0%})"
    )


def _cures(case: Case, mesh_chosen: bool) -> list[str]:
    found = []
    best = candidates(case.config, case.topology, INFERENCE, case.dtype, case.batch, case.context)[0]
    if best.fits:
        mesh = [] if mesh_chosen and best.case.mesh_shape == case.mesh_shape else [f"--mesh {best.case.mesh_name}"]
        layout = [] if best.case.layout == case.layout else [f"--layout {best.case.layout.name}"]
        found.append(" ".join(mesh + layout))
    narrower = [dtype for dtype in NARROW if _weight_total(case, dtype) < case.weight_total]
    if dtype := next((dtype for dtype in narrower if _fits(dataclasses.replace(case, dtype=dtype), mesh_chosen)), None):
        found.append(f"--dtype {dtype}")
    if batch := largest_batch(case):
        found.append(f"--batch {batch}")
    if context := largest_context(case):
        found.append(f"--context {context}")
    for topology in case.topology.larger():
        with contextlib.suppress(UserError):  # no mesh of it divides the model
            best = candidates(case.config, topology, [case.layout], case.dtype, case.batch, case.context)[0]
            if best.fits:
                found.append(f"--topology {topology.name}" + ("" if mesh_chosen else f" --mesh {best.case.mesh_name}"))
                break
    return found


def _weight_total(case: Case, dtype: str) -> int:
    return dataclasses.replace(case, dtype=dtype).weight_total


def _fits(case: Case, mesh_chosen: bool) -> bool:
    if not mesh_chosen:
        return memory(case).fits
    return candidates(case.config, case.topology, [case.layout], case.dtype, case.batch, case.context)[0].fits
