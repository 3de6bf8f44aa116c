"""A picture of a plan: what fills a device's memory, and the limit over the batch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from maverick_jax.errors import UserError
from maverick_jax.plan.chips import GIB
from maverick_jax.plan.memory import Held
from maverick_jax.plan.report import Plan
from maverick_jax.plan.roofline import Cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg", "jpg", "webp")
NARROW = 0.035  # of the bar: a shorter piece has no room for its figure
BLUES = ("#1f4e79", "#2e75b6", "#5b9bd5", "#9dc3e6", "#7f9fbf", "#b7c9dd", "#d0dbe8", "#44668a")
STATES, TEMPORARIES, INK, GRID = ("#548235", "#a9d18e"), "#f4b183", "#333333", "#d9d9d9"
INKED = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
STYLE: dict[Any, Any] = INKED | {"font.size": 10, "axes.edgecolor": GRID, "axes.spines.top": False, "axes.spines.right": False}


def check_plot(file: str | Path) -> None:
    """What can be known before a plan is made: whether its picture can be drawn and written.

    Raises:
      UserError: matplotlib is missing, the name ends in no known format, or the folder is not there or not to be written to.
    """
    name, file = repr(os.fspath(file)), Path(file)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("a plot needs matplotlib: install maverick-jax with the extra `notebooks`.")
    if file.suffix.lower().removeprefix(".") not in FORMATS:
        raise UserError(f"plot {name} has no ending of a picture: name a file that ends in .{', .'.join(FORMATS)}.")
    if file.is_dir():
        raise UserError(f"plot {name} is a folder: name a file.")
    if not file.parent.is_dir():
        raise UserError(f"plot {name}: there is no folder {str(file.parent)!r}: make it first.")
    for place in (file.parent, file):
        if place.exists() and not os.access(place, os.W_OK):
            raise UserError(f"plot {name} cannot be written: you have no permission to write {str(place)!r}.")


def save_plot(plan: Plan, file: str | Path, *, model: str) -> None:
    """Write the memory of a device, piece by piece, and tokens/s over the batch to an image file.

    Args:
      model: its name, for the title.

    Raises:
      UserError: as for `check_plot`, or the file cannot be written.
    """
    case, points = plan.case, sorted((dict(plan.curve) | {plan.case.batch: plan.decode}).items())

    def line(title: str, speed: Callable[[int, Cost], float]) -> Line:
        return Line(title, [Mark(batch, speed(batch, cost), cost.binds) for batch, cost in points], case.batch)

    per_user = line("tokens/s per user", lambda batch, cost: 1 / cost.step)
    in_total = line("tokens/s in total", lambda batch, cost: batch / cost.step)
    question = f"mesh {case.mesh_name}, layout {case.layout.name}, batch {case.batch:,}, context {case.context:,}"
    draw(file, f"{model} in {case.dtype} on {case.topology.name}", plan.memory, question, (per_user, in_total))


class Mark(NamedTuple):
    """A point of a line over the batch, and what binds there."""

    batch: int
    height: float
    binds: str


class Line(NamedTuple):
    """What is at most reached over the batch, and the batch that was asked about, which is one of the marks."""

    title: str
    marks: list[Mark]
    asked: int


def draw(file: str | Path, title: str, held: Held, question: str, lines: Sequence[Line]) -> None:
    """What fills a device's memory, and lines beside each other.

    Raises:
      UserError: as for `save_plot`.
    """
    check_plot(file)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 6.5), layout="constrained")
        figure.suptitle(title, fontsize=15, fontweight="bold", x=0.01, ha="left", parse_math=False)  # a folder's name may have a $
        memory, speed = figure.subfigures(2, 1, squeeze=False, height_ratios=(2, 3))[:, 0]
        _memory(memory.subplots(), held, question)
        for axes, line in zip(speed.subplots(1, len(lines)), lines, strict=True):
            _line(axes, line)
        write(figure, file)


def write(figure: Figure, file: str | Path) -> None:
    """A picture that cannot be finished leaves what was there as it was.

    Raises:
      UserError: the file cannot be written.
    """
    partial = Path(file).with_suffix(f".partial{Path(file).suffix}")
    try:
        figure.savefig(partial, dpi=150)
        partial.replace(file)
    except OSError as error:
        raise UserError(f"plot {str(file)!r} cannot be written: {error.strerror or error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def _memory(axes: Axes, held: Held, question: str) -> None:
    pieces = [(name, size, color) for (name, size), color in zip(held.weights.items(), BLUES, strict=False)]
    pieces += [(name, size, color) for (name, size), color in zip(held.state.items(), STATES, strict=False)]
    pieces += [("temporaries", sum(held.temporaries.values()), TEMPORARIES)]
    width, left = max(held.capacity, held.needed) / GIB, 0.0
    axes.barh(0, held.capacity / GIB, color="#f2f2f2", height=0.8)
    for name, size, color in pieces:
        axes.barh(0, size / GIB, left=left, color=color, height=0.8, label=f"{name}  {size / GIB:.2f}", edgecolor="white", linewidth=0.5)
        if size / GIB > NARROW * width:
            axes.text(left + size / GIB / 2, 0, f"{size / GIB:.1f}", ha="center", va="center", color="white", fontweight="bold")
        left += size / GIB
    axes.axvline(held.usable / GIB, color=INK, linestyle="--", linewidth=1)
    axes.text(held.usable / GIB, 0.46, f"usable {held.usable / GIB:.1f} ", ha="right", va="bottom", fontsize=9)
    free = f"{held.free / GIB:.1f} free" if held.fits else f"{-held.free / GIB:.1f} too much"
    axes.set_title(f"{question}\nGiB per device: {held.needed / GIB:.1f} needed, {free}", loc="left", fontsize=10)
    axes.set(yticks=[], xlim=(0, width), ylim=(-0.45, 0.65))
    axes.spines["left"].set_visible(False)
    axes.legend(fontsize=9, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, handlelength=1)


def _line(axes: Axes, line: Line) -> None:
    """Over the batch, with the batch that was asked about; above it what binds, from where on."""
    from matplotlib.ticker import LogLocator, NullFormatter

    heights = [mark.height for mark in line.marks]
    axes.plot([mark.batch for mark in line.marks], heights, marker="o", markersize=4, color=BLUES[1], linewidth=2)
    asked, rises = line.asked, heights[-1] > heights[0]
    height = next(mark.height for mark in line.marks if mark.batch == asked)
    axes.plot(asked, height, marker="o", markersize=9, color=TEMPORARIES, markeredgecolor=INK)
    # Of a line that does not rise there is room to the right.
    place: dict[str, Any] = {"xytext": (-6 if rises else 6, 7), "textcoords": "offset points", "ha": "right" if rises else "left"}
    axes.annotate(f"{height:,.0f}", (asked, height), fontweight="bold", **place)
    bound = ""
    for batch, _, binds in line.marks:
        if binds != bound:
            bound = binds
            axes.axvline(batch, color=GRID, zorder=0)
            axes.text(batch, 1.0, f" {bound} binds", transform=axes.get_xaxis_transform(), fontsize=9, va="top", color="#7f7f7f")
    axes.set_title(f"at most, {line.title}", loc="left", fontsize=10, pad=12)
    axes.set(xlabel="batch", xscale="log", yscale="log", ylim=(min(heights) / 1.5, max(heights) * 2.5))
    for axis, steps in ((axes.xaxis, (1.0,)), (axes.yaxis, (1.0, 2.0, 5.0))):
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
