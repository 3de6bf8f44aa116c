"""Make a plan of training: of one mesh, or of the best."""

from __future__ import annotations

from collections.abc import Mapping

from maverick_jax.config import Config
from maverick_jax.plan.planner import default_context, mesh_shape
from maverick_jax.plan.topology import Topology
from maverick_jax.plan.training.memory import memory
from maverick_jax.plan.training.recipe import TRAININGS, Recipe, Training
from maverick_jax.plan.training.report import Point, TrainingPlan
from maverick_jax.plan.training.roofline import mfu, step
from maverick_jax.plan.training.room import largest_batch, largest_length
from maverick_jax.plan.training.search import candidates, make_training
from maverick_jax.sharding.layout import Layout, get_layout


def make_training_plan(
    config: Config,
    *,
    training: str,
    topology: str,
    mesh: Mapping[str, int] | None = None,
    layout: str | Layout | Mapping[str, str | tuple[str, ...]] | None = None,
    dtype: str | None = None,
    batch: int | None = None,
    length: int | None = None,
    accumulate: int = 1,
    rank: int = 16,
    expert_rank: int = 4,
    master: bool = False,
    remat: str = "layers",
) -> TrainingPlan:
    """Plan how a model is trained on devices that need not be there.

    Args:
      training: "lora", adapters on attention, dense, shared and routed experts; "qlora", the same beside quantized routed experts; or
        "full", all weights of the text decoder.
      topology, mesh: as for `make_plan`.
      layout: as for `load`; None: "training".
      dtype: of the model, as for `make_plan`. None: int4 for qlora, else bfloat16.
      batch: rows of a micro-batch; None: one for each share of the devices.
      length: tokens of a row; None: 8,192, or what the model takes if that is less.
      accumulate: micro-batches of a step.
      rank, expert_rank, master, remat: as `maverick train` has them, but all within a layer is made again unless it says otherwise.

    Returns:
      A plan, also of what does not fit: see `TrainingPlan.fits` and `TrainingPlan.refusal`.

    Raises:
      UserError: as for `make_plan`; a setting out of range, a base that the training has no use for, or rows that the mesh does not divide.
    """
    recipe = Recipe(training, rank, expert_rank, master, remat, accumulate)
    where, table, length = Topology.parse(topology), get_layout("training" if layout is None else layout), default_context(config, length)
    dtype = TRAININGS[training] if dtype is None else dtype
    if mesh is None:
        chosen = candidates(config, where, table, dtype, batch, length, recipe)[0].training
    else:
        chosen = make_training(config, where, mesh_shape(mesh), table, dtype, batch, length, recipe)
    most = largest_batch(chosen)
    ways = chosen.case.row_ways
    rows = sorted({ways * 2**i for i in range((most // ways).bit_length())} | ({most} if most else set()))
    curve = tuple(_point(chosen.with_rows(count)) for count in rows)
    return TrainingPlan(chosen, mesh is None, _point(chosen), most, largest_length(chosen), curve)


def _point(training: Training) -> Point:
    cost = step(training)
    return Point(training.case.batch, training.tokens, memory(training), cost, mfu(training, cost))
