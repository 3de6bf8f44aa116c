"""A picture of what was measured: decoding over the batch beside its limit, and how long people wait."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from maverick_jax.bench.report import Report
from maverick_jax.plan.plot import BLUES, GRID, INK, STYLE, TEMPORARIES, check_plot, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save_plot(report: Report, file: str | Path, *, model: str) -> None:
    """Write tokens/s over the batch, with the limit, and the times to a token to an image file.

    Args:
      model: its name, for the title.

    Raises:
      UserError: as for `check_plot`, or the file cannot be written.
    """
    check_plot(file)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        figure.suptitle(f"{model} in {report.case.dtype}", fontsize=15, fontweight="bold", x=0.01, ha="left", parse_math=False)
        rates, waits = figure.subplots(1, 2)
        _rates(rates, report)
        _waits(waits, report)
        write(figure, file)


def _rates(axes: Axes, report: Report) -> None:
    sizes, rates = [batch.size for batch in report.batches], [batch.decode_rate for batch in report.batches]
    limits = [batch.decode_rate / max(batch.decode_bytes, batch.decode_products) for batch in report.batches]
    axes.plot(sizes, limits, color=INK, linestyle="--", linewidth=1, label="limit: bytes or products")
    axes.plot(sizes, rates, marker="o", color=BLUES[1], linewidth=2, label="measured")
    for size, rate in zip(sizes, rates, strict=True):
        axes.annotate(f"{rate:,.0f}", (size, rate), xytext=(0, -14), textcoords="offset points", ha="center", fontweight="bold")
    axes.set_title(f"decoding, tokens/s; prompts of {report.prompt:,} tokens", loc="left", fontsize=10)
    _over(axes, sizes, "batch")


def _waits(axes: Axes, report: Report) -> None:
    """Bars from the median to 99 of 100, of the first token and of those behind it."""
    parts = [*report.batches, *([report.random] if report.random else [])]
    names = [*(f"{batch.size:,}" for batch in report.batches), *([f"{report.random.rate:g}/s"] if report.random else [])]
    for shift, color, name, spans in (
        (-0.12, TEMPORARIES, "to the first token", [part.first for part in parts]),
        (0.12, BLUES[1], "from token to token", [part.between for part in parts]),
    ):
        places = [place + shift for place in range(len(parts))]
        axes.vlines(places, [1000 * s.median for s in spans], [1000 * s.p99 for s in spans], color=color, linewidth=5, alpha=0.5)
        axes.plot(places, [1000 * s.median for s in spans], marker="o", linestyle="", color=color, label=name)
    axes.set_title("ms, from the median to 99 of 100", loc="left", fontsize=10)
    axes.set(xticks=range(len(parts)), xticklabels=names, yscale="log", xlabel="batch, or requests at random")
    axes.grid(color=GRID, linewidth=0.5, axis="y")
    axes.legend(frameon=False, fontsize=9)


def _over(axes: Axes, sizes: list[int], label: str) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter

    axes.set(xlabel=label, xscale="log", yscale="log")
    axes.xaxis.set_major_locator(FixedLocator([float(size) for size in sizes]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
