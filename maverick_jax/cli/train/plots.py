"""The demo's pictures: accuracy per task and stage, pass@k before and after, reward over equal time, tokens per expert."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maverick_jax.plan.plot import BLUES, INK, STATES, STYLE, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH = 5  # steps that a point of a curve is the mean of


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def save_plots(report: Mapping[str, Any], file: Path) -> None:
    """All four in one picture.

    Args:
      report: of `pipeline.run`.

    Raises:
      UserError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(13, 8), layout="constrained")
        (accuracy, tries), (reward, experts) = figure.subplots(2, 2, width_ratios=(3, 2))
        _accuracy(accuracy, report["stages"])
        _tries(tries, report["tries"])
        _reward(reward, report["curves"])
        _experts(experts, report["loads"])
        write(figure, file)


def _accuracy(axes: Axes, stages: Mapping[str, Mapping[str, float]]) -> None:
    tasks = [*next(iter(stages.values()))]
    wide = 0.8 / len(stages)
    for at, (name, of_task) in enumerate(stages.items()):
        places = np.arange(len(tasks)) + (at - (len(stages) - 1) / 2) * wide
        axes.bar(places, [of_task[task] for task in tasks], wide, label=name, color=BLUES[at % len(BLUES)])
    axes.set(xticks=range(len(tasks)), xticklabels=tasks, ylim=(0, 1))
    axes.set_title("right answers to held-out questions", loc="left")
    axes.legend(fontsize=8, ncols=3, frameon=False)


def _tries(axes: Axes, tries: Mapping[str, Mapping[str, float]]) -> None:
    kinds = [*next(iter(tries.values()))]
    for at, (name, of_kind) in enumerate(tries.items()):
        places = np.arange(len(kinds)) + (at - 0.5) * 0.4
        found = axes.bar(places, [of_kind[kind] for kind in kinds], 0.4, label=name, color=BLUES[2 * at])
        axes.bar_label(found, fmt="{:.2f}", fontsize=8)
    axes.set(xticks=range(len(kinds)), xticklabels=kinds, ylim=(0, 1.1))
    axes.set_title("one try and several, before and after", loc="left")
    axes.legend(fontsize=8, frameon=False)


def _reward(axes: Axes, curves: Mapping[str, list[Mapping[str, float]]]) -> None:
    for (name, points), color in zip(curves.items(), (STATES[0], INK), strict=True):
        near = min(SMOOTH, len(points))
        smooth = np.convolve([point["reward"] for point in points], np.full(near, 1 / near), "valid")
        share = np.arange(near, len(points) + 1) / len(points)
        axes.plot(share, smooth, label=f"{name}, {len(points)} steps", color=color)
    axes.set_xlabel("share of the time, which both have alike")
    axes.set_title("mean reward of what is drawn", loc="left")
    axes.legend(fontsize=8, frameon=False)


def _experts(axes: Axes, loads: Mapping[str, list[list[int]]]) -> None:
    for (name, load_ME), color in zip(loads.items(), (BLUES[0], STATES[1]), strict=True):
        share_E = np.sort(np.array(load_ME).sum(axis=0))[::-1] / np.sum(load_ME)
        axes.plot(share_E, label=name, color=color)
    axes.set(yscale="log", xlabel="experts, the busiest first")
    axes.set_title("share of the tokens that an expert has", loc="left")
    axes.legend(fontsize=8, frameon=False)
