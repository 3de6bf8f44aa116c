"""A plan of training, as text and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from maverick_jax.plan.chips import GIB
from maverick_jax.plan.report import (
    aligned,
    bound,
    cost_lines,
    cost_values,
    devices_of,
    memory_lines,
    memory_values,
    mesh_of,
    seconds,
    share_notes,
    size_of,
)
from maverick_jax.plan.roofline import Cost
from maverick_jax.plan.training.memory import TrainingMemory
from maverick_jax.plan.training.recipe import Training
from maverick_jax.plan.training.room import refusal


class Point(NamedTuple):
    """So many rows of a micro-batch, the tokens of a step with them, and what that costs."""

    rows: int
    tokens: int
    memory: TrainingMemory
    cost: Cost
    mfu: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.cost.step


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What training costs; `str(plan)` is what `maverick plan --train` prints.

    Attributes:
      training: the question.
      mesh_chosen: the mesh was not given: it is the best of those that divide.
      asked: the answer.
      largest_batch, largest_length: rows of a micro-batch and tokens of a row that fit if the other stays (0: nothing does).
      curve: from one row for each share of the devices to the most.
    """

    training: Training
    mesh_chosen: bool
    asked: Point
    largest_batch: int
    largest_length: int
    curve: tuple[Point, ...]

    @property
    def fits(self) -> bool:
        return self.asked.memory.fits

    @property
    def refusal(self) -> str:
        """One line for a plan that does not fit: by how much, and what would."""
        return refusal(self.training, mesh_chosen=self.mesh_chosen)

    @property
    def notes(self) -> list[str]:
        """What a reader must know beside the numbers."""
        return share_notes(self.training.case, self.asked.memory)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes, seconds and tokens, unrounded."""
        return as_dict(self)

    def __str__(self) -> str:
        return "\n\n".join(
            "\n".join(part) for part in (_question(self), memory_lines(self.asked.memory), _step(self), _room(self), _curve(self))
        )


def _question(plan: TrainingPlan) -> list[str]:
    case = plan.training.case
    return [
        size_of(case),
        _learned(plan.training),
        devices_of(case),
        mesh_of(case, plan.mesh_chosen),
        *(f"note: {note}" for note in plan.notes),
    ]


def _learned(training: Training) -> str:
    """What is learned, and from how many rows at a time."""
    recipe = training.recipe
    kept = " in float32" if recipe.master or recipe.adapts else ""
    what = f"adapters of rank {recipe.rank}, of routed experts {recipe.expert_rank}" if recipe.adapts else "all weights of the text decoder"
    again = {"layers": "layers made again", "products": "all but products made again", "none": "nothing made again"}[recipe.remat]
    return f"{recipe.training}: {training.learned_count / 1e6:,.1f} M parameters are learned{kept}, {what}; {again}"


def _step(plan: TrainingPlan) -> list[str]:
    cost, case, micro = plan.asked.cost, plan.training.case, plan.training.recipe.accumulate
    batches = f"{micro} micro-batches of " if micro > 1 else ""
    speed = plan.asked.tokens_per_second
    return [
        f"a step, {batches}{case.batch:,} rows of {case.context:,} tokens: at least {seconds(cost.step)}, {bound(cost.binds)}; "
        f"{seconds(cost.serial)} if nothing overlaps",
        *cost_lines(cost),
        f"  at most {speed:,.0f} tokens/s, {speed / case.topology.devices:,.0f} per device; MFU at most {plan.asked.mfu:.0%}",
    ]


def _room(plan: TrainingPlan) -> list[str]:
    rows, length = plan.training.case.batch, plan.training.case.context
    return [f"room for {plan.largest_batch:,} rows of {length:,} tokens in a micro-batch, or for {rows:,} of {plan.largest_length:,}"]


def _curve(plan: TrainingPlan) -> list[str]:
    lines = [("rows", "GiB", "step", "tokens/s", "per device", "MFU", "bound by")]
    last = len(plan.curve) - 1
    for point in (point for i, point in enumerate(plan.curve) if i % 2 == 0 or i == last):
        speed = point.tokens_per_second
        per_device = speed / plan.training.case.topology.devices
        cells = (f"{point.rows:,}", f"{point.memory.needed / GIB:.1f}", seconds(point.cost.step), f"{speed:,.0f}", f"{per_device:,.0f}")
        lines.append((*cells, f"{point.mfu:.0%}", point.cost.binds))
    return aligned(lines)


def as_dict(plan: TrainingPlan) -> dict[str, Any]:
    """Bytes, seconds and tokens, unrounded."""
    training, case, held = plan.training, plan.training.case, plan.asked.memory
    return {
        "topology": case.topology.name,
        "devices": case.topology.devices,
        "hosts": case.topology.hosts,
        "mesh": dict(case.mesh.shape),
        "layout": case.layout.name,
        "dtype": case.dtype,
        **dataclasses.asdict(training.recipe),
        "batch": case.batch,
        "length": case.context,
        "notes": plan.notes,
        "parameters": case.parameter_count,
        "learned": training.learned_count,
        "weight_bytes": case.weight_total,
        "memory_per_device": memory_values(held) | {"adapters": held.adapters, "moments": held.moments},
        "step": {
            **cost_values(plan.asked.cost),
            "tokens": plan.asked.tokens,
            "tokens_per_second": plan.asked.tokens_per_second,
            "mfu": plan.asked.mfu,
        },
        "largest_batch": plan.largest_batch,
        "largest_length": plan.largest_length,
        "over_batch": [
            {
                "batch": point.rows,
                "needed": point.memory.needed,
                "step": point.cost.step,
                "tokens_per_second": point.tokens_per_second,
                "mfu": point.mfu,
                "binds": point.cost.binds,
            }
            for point in plan.curve
        ],
    }
