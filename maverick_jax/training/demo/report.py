"""What came out, as tables: of one run, or of several seeds together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maverick_jax.training.demo.evaluation import mcnemar

CHANCE = 0.05  # of p: above it a difference is called none


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy of each stage by task, the mean of the seeds; what each comparison came to; pass@k; what the filter and RL did.

    Args:
      reports: of `pipeline.run`, each with another seed.
    """
    return "\n\n".join([_accuracy(reports), _comparisons(reports), _tries(reports), _reinforced(reports)])


def joined(reports: Sequence[Mapping[str, Any]], at: int) -> dict[str, Any]:
    """One comparison over all seeds: mean of the differences, and the test of all discordant answers together.

    The questions are the same for every seed, and count as others: the joint p is too low, the seeds' own say more.
    """
    of_seeds = [report["comparisons"][at] for report in reports]
    only = {name: sum(found[name] for found in of_seeds) for name in ("only_stage", "only_control")}
    difference = float(np.mean([found["difference"] for found in of_seeds]))
    return {**of_seeds[0], "difference": difference, **only, "p": mcnemar(*only.values())}


def _accuracy(reports: Sequence[Mapping[str, Any]]) -> str:
    names = [*reports[0]["stages"]]
    tasks = [*reports[0]["stages"][names[0]]]
    rows = [["accuracy", *tasks, *(f"seed {report['seed']}" for report in reports if len(reports) > 1)]]
    for name in names:
        means = [np.mean([report["stages"][name][task] for report in reports]) for task in tasks]
        seeds = [report["stages"][name]["all"] for report in reports if len(reports) > 1]
        rows.append([name, *(f"{100 * share:.1f}" for share in (*means, *seeds))])
    return aligned(rows)


def _comparisons(reports: Sequence[Mapping[str, Any]]) -> str:
    rows = [["stage", "against", *(f"seed {report['seed']}" for report in reports), "all", "only one right", "p", ""]]
    for at, found in enumerate(reports[0]["comparisons"]):
        both = joined(reports, at)
        seeds = [f"{100 * report['comparisons'][at]['difference']:+.1f}" for report in reports]
        only = f"{both['only_stage']} : {both['only_control']}"
        rows.append([found["stage"], found["control"], *seeds, f"{100 * both['difference']:+.1f}", only, f"{both['p']:.2g}", verdict(both)])
    return aligned(rows)


def verdict(comparison: Mapping[str, Any]) -> str:
    """In a word."""
    if comparison["p"] > CHANCE:
        return "no difference"
    return "better" if comparison["only_stage"] > comparison["only_control"] else "worse"


def _tries(reports: Sequence[Mapping[str, Any]]) -> str:
    tries = [report["tries"] for report in reports]
    kinds = [*tries[0]["base"]]
    means = {name: [np.mean([found[name][kind] for found in tries]) for kind in kinds] for name in tries[0]}
    return aligned([["tries", *kinds], *([name, *(f"{100 * share:.1f}" for share in shares)] for name, shares in means.items())])


def _reinforced(reports: Sequence[Mapping[str, Any]]) -> str:
    """What equal time was used for."""
    rows = [["in equal time", "steps", "groups drawn", "without advantage", "reward of the last quarter"]]
    for name in reports[0]["curves"]:
        curves = [report["curves"][name] for report in reports]
        drawn, idle = (
            np.mean([sum(point[of] for point in curve) for curve in curves]) for of in ("groups_drawn", "groups_without_advantage")
        )
        last = np.mean([np.mean([point["reward"] for point in curve[-max(1, len(curve) // 4) :]]) for curve in curves])
        rows.append([name, f"{np.mean([len(curve) for curve in curves]):.0f}", f"{drawn:.0f}", f"{idle / drawn:.0%}", f"{last:.2f}"])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Words to the left, where a column has a heading of numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = [all(not cell[:1].isdigit() and cell[:1] not in "+-" for cell in column[1:]) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" if word else f"{cell:>{width}}" for cell, width, word in zip(row, widths, words, strict=True)).rstrip()
        for row in rows
    )
