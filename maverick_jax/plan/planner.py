"""Make plans: of one mesh, of the best, or of all that divide and fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.inference.checks import Range, shown, whole
from maverick_jax.plan.case import Case
from maverick_jax.plan.memory import memory
from maverick_jax.plan.report import Plan
from maverick_jax.plan.roofline import decode, prefill
from maverick_jax.plan.room import largest_batch, largest_context
from maverick_jax.plan.search import candidates
from maverick_jax.plan.topology import Topology
from maverick_jax.sharding.layout import INFERENCE, Layout, get_layout
from maverick_jax.sharding.mesh import AXES as MESH_AXES

CONTEXT = 8192  # tokens, one attention chunk of the releases
BEST = Range(whole, 1, float("inf"), "a whole number, 1 or more")
DEVICES = Range(whole, 1, 2**20, "a whole number, 1 to 1,048,576 devices")


def make_plan(
    config: Config,
    *,
    topology: str,
    mesh: Mapping[str, int] | None = None,
    layout: str | Layout | Mapping[str, str | tuple[str, ...]] | None = None,
    dtype: str = "bfloat16",
    batch: int = 64,
    context: int | None = None,
) -> Plan:
    """Plan a model on devices that need not be there.

    Args:
      topology: such as "v6e:8x8", "h100:8" or, two hosts of eight, "h100:8x2".
      mesh: devices on the axes data, expert and tensor; an axis left out is 1. None: the fastest mesh that fits.
      layout: as for `load`.
      dtype: "bfloat16", "float32", or for routed experts in 8 or 4 bits and the rest in bfloat16 "fp8", "int8" (a scale per
        output channel) or "int4" (a scale per 128 inputs of an output channel).
      batch, context: rows, and tokens that each has room for (None: 8,192, or what the model takes if that is less).

    Returns:
      A plan, also of what does not fit: see `Plan.fits` and `Plan.refusal`.

    Raises:
      UserError: an unknown topology or dtype, a mesh that does not divide or lacks an axis of the layout, a batch or context out of
        range, an argument of another type.
    """
    where, table, context = Topology.parse(topology), get_layout(layout), default_context(config, context)
    if mesh is None:
        case = candidates(config, where, [table], dtype, batch, context)[0].case
    else:
        case = Case(config, where, mesh_shape(mesh), table, dtype, batch, context)
    return _plan(case, mesh_chosen=mesh is None)


def search(
    config: Config,
    *,
    topology: str,
    layout: str | None = None,
    dtype: str = "bfloat16",
    batch: int = 64,
    context: int | None = None,
    best: int = 8,
) -> list[Plan]:
    """The fastest meshes that fit, in one layout or (None) in all; if none fits, the one that lacks least.

    Args:
      config, topology, layout, dtype, batch, context: as for `make_plan`.
      best: the most plans that are made.

    Raises:
      UserError: as for `make_plan`.
    """
    best, context = BEST.check("best", best), default_context(config, context)
    layouts = list(INFERENCE) if layout is None else [get_layout(layout)]
    found = candidates(config, Topology.parse(topology), layouts, dtype, batch, context)
    fitting = [candidate for candidate in found if candidate.fits] or found[:1]
    return [_plan(candidate.case, mesh_chosen=True) for candidate in fitting[:best]]


def default_context(config: Config, context: int | None) -> int:
    """Tokens of a row, where nobody says: a chunk of the releases, or what the model takes."""
    if not isinstance(config, Config):
        raise UserError(f"config is {shown(config)}: expected a Config, such as Config.maverick().")
    return min(CONTEXT, config.text.max_position_embeddings) if context is None else context


def mesh_shape(mesh: Mapping[str, int]) -> tuple[int, ...]:
    """Devices on all axes of a mesh."""
    if not isinstance(mesh, Mapping):
        raise UserError(f'mesh is {shown(mesh)}: expected a dict from axis to devices, such as {{"expert": 8, "tensor": 8}}.')
    if unknown := [axis for axis in mesh if axis not in MESH_AXES]:
        raise UserError(f"mesh axis {shown(unknown[0])} is unknown: the axes are {', '.join(MESH_AXES)}.")
    return tuple(DEVICES.check(f"mesh axis {axis}", mesh.get(axis, 1)) for axis in MESH_AXES)


def _plan(case: Case, *, mesh_chosen: bool) -> Plan:
    most = largest_batch(case)
    batches = sorted({2**i for i in range(most.bit_length())} | ({most} if most else set()))
    curve = tuple((batch, decode(dataclasses.replace(case, batch=batch))) for batch in batches)
    return Plan(case, mesh_chosen, memory(case), decode(case), prefill(case), most, largest_context(case), curve)
