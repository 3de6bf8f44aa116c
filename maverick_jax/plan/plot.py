"""A picture of a plan: where the bytes go, and the limit over batch."""

from __future__ import annotations

from pathlib import Path

from maverick_jax.errors import UserError
from maverick_jax.plan.chips import GIB
from maverick_jax.plan.report import Plan


def save_plot(plan: Plan, file: str | Path) -> None:
    """Write memory per device (stacked) and tokens/s over batch to an image file.

    Raises:
      UserError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a plot needs matplotlib: install maverick-jax with the extra `notebooks`.") from None
    case, held = plan.case, plan.memory
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(f"{case.dtype} on {case.topology.name}, {case.mesh_name}, {case.layout.name}, context {case.context:,}")
    bytes_axis, speed_axis = figure.subplots(1, 2, width_ratios=(1, 2))

    parts = {**held.weights, "cache, RoPE layers": held.rope_cache, "cache, NoPE layers": held.full_cache}
    parts["temporaries"] = sum(held.temporaries.values())
    bottom = 0.0
    for i, (name, size) in enumerate(parts.items()):
        bytes_axis.bar(0, size / GIB, bottom=bottom, color=colormaps["tab20"](i), label=name)
        bottom += size / GIB
    bytes_axis.axhline(held.usable / GIB, color="black", linestyle="--", label="usable")
    bytes_axis.set_title(f"memory per device, batch {case.batch}", pad=18)
    bytes_axis.set(ylabel="GiB", xticks=[], xlim=(-1, 1))
    bytes_axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)

    batches = [batch for batch, _ in plan.curve]
    speed_axis.plot(batches, [1 / cost.step for _, cost in plan.curve], marker="o", label="per user")
    speed_axis.plot(batches, [batch / cost.step for batch, cost in plan.curve], marker="o", label="in total")
    bound = ""
    for batch, cost in plan.curve:
        if cost.binds != bound:
            bound = cost.binds
            speed_axis.axvline(batch, color="grey", linestyle=":")
            speed_axis.text(batch, 1.01, f"{bound} binds", transform=speed_axis.get_xaxis_transform())
    speed_axis.set_title("limit of decoding", pad=18)
    speed_axis.set(xlabel="batch", ylabel="tokens/s", xscale="log", yscale="log")
    speed_axis.legend()
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise UserError(f"the plot cannot be written to {file}: {error}") from error
