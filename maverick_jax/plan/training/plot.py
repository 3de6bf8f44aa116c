"""A picture of a plan of training: what fills a device's memory, and how fast a step can be over the rows of a micro-batch."""

from __future__ import annotations

from pathlib import Path

from maverick_jax.plan.plot import Line, Mark, draw
from maverick_jax.plan.training.report import TrainingPlan


def save_training_plot(plan: TrainingPlan, file: str | Path, *, model: str) -> None:
    """Write the memory of a device, piece by piece, and tokens/s and the MFU over the rows to an image file.

    Args:
      model: its name, for the title.

    Raises:
      UserError: as for `check_plot`, or the file cannot be written.
    """
    case, recipe = plan.training.case, plan.training.recipe
    points = sorted(({point.rows: point for point in plan.curve} | {case.batch: plan.asked}).items())
    speed = [Mark(rows, point.tokens_per_second, point.cost.binds) for rows, point in points]
    share = [Mark(rows, 100 * point.mfu, point.cost.binds) for rows, point in points]
    question = f"mesh {case.mesh_name}, layout {case.layout.name}, {case.batch:,} rows of {case.context:,} tokens, remat {recipe.remat}"
    lines = (Line("tokens/s", speed, case.batch), Line("MFU, %", share, case.batch))
    draw(file, f"{recipe.training}: {model} in {case.dtype} on {case.topology.name}", plan.asked.memory, question, lines)
