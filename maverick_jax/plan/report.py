"""A plan: everything that is known about a case before anyone rents anything, as text and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from maverick_jax.plan.case import Case
from maverick_jax.plan.chips import GIB
from maverick_jax.plan.memory import RESERVE, Held, Memory
from maverick_jax.plan.roofline import LAUNCH_SECONDS, Cost, Prefill, token_bytes
from maverick_jax.plan.room import refusal

GPU_DEFAULT_SHARE = 0.75  # of a GPU's memory, jax's XLA_CLIENT_MEM_FRACTION


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
            parts = case.among(case.split_pages).total
            lies = f"each row's cache lies on {parts} by its sequence" if parts > 1 else "each of these has a row's whole cache"
            found.append(f"batch {case.batch} is no multiple of {case.row_ways}: devices share rows, and {lies}.")
        return found + share_notes(case, self.memory)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return as_dict(self)

    def __str__(self) -> str:
        return as_text(self)


def share_notes(case: Case, held: Held) -> list[str]:
    """That jax must be told to take more of a GPU's memory than it does."""
    beyond = case.topology.chip.is_gpu and held.needed > GPU_DEFAULT_SHARE * held.capacity
    return ["jax takes 75 % of a GPU's memory by default: set XLA_CLIENT_MEM_FRACTION=0.94."] if beyond else []


def as_text(plan: Plan) -> str:
    """Memory by component, the limit of a decode step and of a prefill, and how the limit moves with the batch."""
    return "\n\n".join(
        "\n".join(part) for part in (_question(plan), memory_lines(plan.memory), _decode(plan), _prefill(plan), _room(plan), _curve(plan))
    )


def _question(plan: Plan) -> list[str]:
    case = plan.case
    return [
        f"{size_of(case)}; batch {case.batch:,}, context {case.context:,}",
        devices_of(case),
        mesh_of(case, plan.mesh_chosen),
        *(f"note: {note}" for note in plan.notes),
    ]


def size_of(case: Case) -> str:
    """The model's."""
    count, total = case.parameter_count, case.weight_total
    parameters = f"{count / 1e9:,.1f} B parameters" if count >= 1e8 else f"{count / 1e6:,.1f} M parameters"
    return f"{parameters}, {total / 1e9:,.2f} GB in {case.dtype}"


def devices_of(case: Case) -> str:
    """How many, and what each can do."""
    chip = case.topology.chip
    network = f", network {chip.network / 1e9:,.0f} GB/s" if case.topology.hosts > 1 else ""
    many = f"{case.topology.devices:,} devices" if case.topology.devices > 1 else "1 device"
    halves = f" ({chip.devices_per_chip} of each chip)" if chip.devices_per_chip > 1 else ""
    return (
        f"{case.topology.name}: {many}{halves} of {chip.memory / GIB:.0f} GiB "
        f"at {chip.bandwidth / 1e9:,.0f} GB/s, {chip.flops / 1e12:,.0f} TFLOP/s, links {chip.link / 1e9:,.0f} GB/s each way{network}"
    )


def mesh_of(case: Case, chosen: bool) -> str:
    """The mesh and the layout; `chosen`: by the plan."""
    return f"mesh {case.mesh_name}{' (the best that divides)' if chosen else ''}, layout {case.layout.name}"


def memory_lines(held: Held) -> list[str]:
    """A line per piece, and what is left."""
    totals = [("total", held.needed), ("usable", held.usable), ("free", held.free)]
    lines = [("GiB per device", "")] + [(name, f"{size / GIB:.2f}") for name, size in [*held.pieces.items(), *totals]]
    text = aligned(lines)
    text[-2] += f"   {held.capacity / GIB:.0f} GiB less {RESERVE:.0%} for the runtime"
    text[-1] += "   it fits" if held.fits else "   it does not fit"
    return text


def _decode(plan: Plan) -> list[str]:
    cost, case = plan.decode, plan.case
    return [
        f"decode, one token per row: at least {seconds(cost.step)} per step, {bound(cost.binds)}; "
        f"{seconds(cost.serial)} if nothing overlaps",
        *cost_lines(cost),
        f"  at most {1 / cost.step:,.0f} tokens/s per user, {case.batch / cost.step:,.0f} in total, "
        f"{case.batch / cost.step / case.topology.devices:,.0f} per device",
        *([f"  {_experts(plan)}"] if cost.distinct else []),
        *([f"  {_launches(cost)}"] if cost.launches else []),
    ]


def cost_lines(cost: Cost) -> list[str]:
    """A line per resource: how long it is busy, and with what."""
    return aligned(
        [
            ("  memory", seconds(cost.seconds["memory"]), f"{sum(cost.read.values()) / 1e9:,.2f} GB: {_largest(cost.read)}"),
            ("  compute", seconds(cost.seconds["compute"]), f"{sum(cost.products.values()) / 1e12:,.3f} TFLOP"),
            ("  links", seconds(cost.seconds["links"]), _sent(cost)),
            *([("  network", seconds(cost.seconds["network"]), _crossed(cost))] if "network" in cost.seconds else []),
        ]
    )


def _launches(cost: Cost) -> str:
    each = f"{seconds(LAUNCH_SECONDS)} each, as on an H200"
    return f"not counted in it: about {cost.launches:,} launches, {seconds(cost.launches * LAUNCH_SECONDS)} ({each})"


def _sent(cost: Cost) -> str:
    if not cost.collectives:
        return "none"
    return f"{sum(cost.sent.values()) / 1e6:.1f} MB in {cost.collectives} collectives: {_largest(cost.sent)}"


def _crossed(cost: Cost) -> str:
    if not cost.crossed:
        return "none"
    return f"{sum(cost.crossed.values()) / 1e6:.1f} MB to other hosts: {_largest(cost.crossed)}"


def _experts(plan: Plan) -> str:
    case = plan.case
    text = f"{plan.decode.distinct:.1f} of {case.config.text.num_local_experts} experts hit in a layer"
    travels = any("all-to-all" in name for name in plan.decode.sent)
    return text + (f"; a token takes {token_bytes(case):,} B to its expert and as many back" if travels else "")


def _prefill(plan: Plan) -> list[str]:
    found, case = plan.prefill, plan.case
    prompts = f"{found.rows} prompts" if found.rows > 1 else "a prompt"
    everyone = f", for all {case.batch} after {seconds(found.batch_seconds)}" if case.batch > found.rows else ""
    return [
        f"prefill, {prompts} of {case.context:,} tokens in pieces of {found.piece:,}: first token after at least "
        f"{seconds(found.seconds)}{everyone}; {bound(found.binds)}; at most {found.tokens_per_second:,.0f} tokens/s"
    ]


def _room(plan: Plan) -> list[str]:
    case = plan.case
    return [
        f"room for batch {plan.largest_batch:,} at context {case.context:,}, or context {plan.largest_context:,} at batch {case.batch:,}"
    ]


def _curve(plan: Plan) -> list[str]:
    rows = [("batch", "step", "tokens/s per user", "in total", "per device", "bound by")]
    last = len(plan.curve) - 1
    for batch, cost in (point for i, point in enumerate(plan.curve) if i % 2 == 0 or i == last):
        speed = batch / cost.step
        per_device = speed / plan.case.topology.devices
        rows.append((f"{batch:,}", seconds(cost.step), f"{1 / cost.step:,.0f}", f"{speed:,.0f}", f"{per_device:,.1f}", cost.binds))
    return aligned(rows)


def search_table(plans: list[Plan]) -> str:
    """A line per plan."""
    rows = [("mesh", "layout", "GiB", "free", "step", "tokens/s per user", "in total", "per device", "largest batch", "bound by")]
    for plan in plans:
        case, step = plan.case, plan.decode.step
        total = case.batch / step
        rows.append(
            (
                case.mesh_name,
                case.layout.name,
                f"{plan.memory.needed / GIB:.1f}",
                f"{plan.memory.free / GIB:.1f}",
                seconds(step),
                f"{1 / step:,.0f}",
                f"{total:,.0f}",
                f"{total / case.topology.devices:,.0f}",
                f"{plan.largest_batch:,}",
                plan.decode.binds,
            )
        )
    return "\n".join(aligned(rows, left=2))


def as_dict(plan: Plan) -> dict[str, Any]:
    """Bytes, seconds and tokens, unrounded."""
    case, held = plan.case, plan.memory
    return {
        "topology": case.topology.name,
        "devices": case.topology.devices,
        "hosts": case.topology.hosts,
        "mesh": dict(case.mesh.shape),
        "layout": case.layout.name,
        "dtype": case.dtype,
        "batch": case.batch,
        "context": case.context,
        "notes": plan.notes,
        "parameters": case.parameter_count,
        "weight_bytes": case.weight_total,
        "memory_per_device": memory_values(held) | {"rope_cache": held.rope_cache, "nope_cache": held.full_cache},
        "decode": _decode_values(plan.decode, case.batch, case.topology.devices),
        "prefill": vars(plan.prefill),
        "largest_batch": plan.largest_batch,
        "largest_context": plan.largest_context,
        "over_batch": [
            {"batch": batch, "step": cost.step, "tokens_per_second": batch / cost.step, "binds": cost.binds} for batch, cost in plan.curve
        ],
    }


def memory_values(held: Held) -> dict[str, Any]:
    """Bytes of a device, by piece and in all."""
    names = ("weights", "temporaries", "needed", "usable", "capacity", "fits")
    return {name: getattr(held, name) for name in names}


def cost_values(cost: Cost) -> dict[str, Any]:
    """What a device does in a step, and how long that takes at least."""
    return {
        "read_bytes": cost.read,
        "products": cost.products,
        "sent_bytes": cost.sent,
        "crossed_bytes": cost.crossed,
        "collectives": cost.collectives,
        "seconds": cost.seconds,
        "step": cost.step,
        "serial": cost.serial,
        "binds": cost.binds,
    }


def _decode_values(cost: Cost, batch: int, devices: int) -> dict[str, Any]:
    return cost_values(cost) | {
        "launches": cost.launches,
        "distinct_experts": cost.distinct,
        "tokens_per_second": {"user": 1 / cost.step, "total": batch / cost.step, "device": batch / cost.step / devices},
    }


def seconds(time: float) -> str:
    """Three digits with a unit that suits."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if time * factor >= 1:
            return f"{time * factor:.3g} {unit}" if time * factor < 1000 else f"{time * factor:,.0f} {unit}"
    return f"{time * 1e6:.3g} µs"


def bound(binds: str) -> str:
    """What binds, as a clause."""
    return {"memory": "memory binds", "compute": "compute binds", "links": "the links bind", "network": "the network binds"}[binds]


def _largest(sizes: dict[str, float]) -> str:
    """The three largest shares."""
    total = sum(sizes.values())
    shares = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name} {size / total:.0%}" for name, size in shares)


def aligned(rows: Iterable[tuple[str, ...]], *, left: int = 1) -> list[str]:
    """Columns of equal width, the first `left` of them and the last aligned to the left."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1 if len(widths) > 2 else len(widths)
    return [
        "  ".join(
            f"{cell:<{width}}" if i < left or i == last else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
