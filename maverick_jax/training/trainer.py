"""The loop: take a batch, make a step, say how it went, keep what was learned. One for every kind of training.

RUN/run.json        what it is (`run.py`)
RUN/checkpoints/    the last few, by Orbax
RUN/metrics.jsonl   a line per step; RUN/tensorboard/ the same as curves
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from maverick_jax.errors import UserError
from maverick_jax.model import Llama4
from maverick_jax.ops.linear import PRODUCT
from maverick_jax.sharding import multihost
from maverick_jax.training.batch import laid_out
from maverick_jax.training.checkpoints import Checkpoints
from maverick_jax.training.held_out import HeldOut
from maverick_jax.training.optimization import Optimization
from maverick_jax.training.report import Report, summarize
from maverick_jax.training.run import begin_run
from maverick_jax.training.split import Split
from maverick_jax.training.step import Objective, begin, compile_update, make_measure, make_update

CHECKPOINTS = "checkpoints"
REMAT = {
    "none": None,
    "products": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "layers": jax.checkpoint_policies.nothing_saveable,
}


class Data(Protocol):
    """Batches without end, in an order that can be taken up anywhere."""

    def take(self, model: Callable[[], Llama4]) -> tuple[Any, dict[str, Any]]:
        """A tree of [A, B, ...] that has `ids_BT`, and what there is to say of it. `model()` is the model as it is now."""
        ...

    def state(self) -> dict[str, Any]: ...

    def go_to(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Loop:
    """How a run goes on, which changes nothing of what it learns.

    Attributes:
      save_every: steps between checkpoints.
      keep: checkpoints that stay.
      remat: of `REMAT`: what the backward pass makes again, "layers" all within a layer, "products" all but products by weights that
        are not an expert's: attention's scores, and what travels to experts, are too much to keep.
      progress: show a bar.
      flops_per_step, peak_flops: for the MFU, if the devices' peak is known.
      stop: asked after every step; True ends the run there.
    """

    save_every: int = 100
    keep: int = 2
    remat: str = "none"
    progress: bool = False
    flops_per_step: float = 0.0
    peak_flops: float | None = None
    stop: Callable[[int, dict[str, Any]], bool] = lambda step, record: False


def train(
    model: Llama4,
    objective: Objective,
    data: Data,
    optimization: Optimization,
    out: Path,
    *,
    identity: Mapping[str, Any],
    loop: Loop = Loop(),
    held_out: HeldOut | None = None,
    frozen: Sequence[str] = (),
    master: bool = False,
) -> Llama4:
    """Learn until `optimization.steps` are made, from where an earlier call with the same arguments stopped, however it ended.

    Args:
      model: its learned arrays are used up; quantized weights, and all others where it has adapters, stay.
      data: gives trees of [A, B, ...], for A micro-batches.
      out: the run's directory.
      identity: what this run must have in common with what is there, in words or numbers.
      held_out: what is not learned from and ends the run when it gets no better.
      frozen, master: as of `Split`.

    Returns:
      The model with what was learned: where something was held out, as it was when that went best.

    Raises:
      UserError: the run there is another one; a loss that is no number; no room on the disk.
    """
    model.text.remat = REMAT[loop.remat]
    split, optimizer = Split(model, frozen=frozen, master=master), optimization.optimizer()
    begin_run(out, {**identity, **_shapes(split), **{f"optimizer {k}": v for k, v in dataclasses.asdict(optimization).items()}})
    progress = begin(split, optimizer)
    checkpoints = Checkpoints(out / CHECKPOINTS, keep=loop.keep)
    done = checkpoints.latest or 0
    losses: dict[int, float] = {}  # of what is held out, by step
    if done:
        progress, beside = checkpoints.load(done, progress), checkpoints.beside(done)
        data.go_to(beside["data"])
        losses = {int(step): loss for step, loss in beside["losses"].items()}
    measure = make_measure(split, objective)
    update = compile_update(make_update(split, objective, optimizer), progress)
    report = Report(out, steps=optimization.steps, done=done, progress=loop.progress) if multihost.is_first() else None
    try:
        for step in range(done + 1, optimization.steps + 1):
            if held_out is not None and held_out.is_over(losses):
                break
            batch, said = data.take(functools.partial(split.model, progress.learned, split.frozen))
            place = data.state()
            progress, measures = update(progress, split.frozen, laid_out(model, batch))
            record = summarize(jax.tree.map(np.asarray, measures))
            if not math.isfinite(record["loss"]) or not math.isfinite(record["gradient_norm"]):
                raise UserError(_not_finite(step, record, checkpoints.latest, out))
            record |= {"learning_rate": float(optimization.rate(step - 1)), **said}
            last = step == optimization.steps or loop.stop(step, record)
            looks = held_out is not None and (last or step % held_out.every == 0)
            if held_out is not None and looks:
                sums = measure(progress.learned, split.frozen, laid_out(model, held_out.batches))
                found = summarize(jax.tree.map(np.asarray, sums))
                record |= {f"held_out_{name}": value for name, value in found.items() if np.ndim(value) == 0}
                losses[step] = found["loss"]
            if report is not None:
                report.step(step, record, tokens=batch.ids_BT.size, flops=loop.flops_per_step, peak=loop.peak_flops)
            if last or looks or step % loop.save_every == 0:
                checkpoints.save(step, progress, {"data": place, "losses": losses}, loss=losses.get(step))
            if last:
                break
        if held_out is not None:
            checkpoints.wait()
            progress = checkpoints.load(min(losses, key=lambda step: (losses[step], -step)), progress)
    finally:
        checkpoints.close()
        if report is not None:
            report.close()
    return split.model(progress.learned, split.frozen)


def _shapes(split: Split) -> dict[str, Any]:
    return {"number of learned parameters": len(split.learned), **{name: [*split.learned[name].shape] for name in sorted(split.learned)}}


def _not_finite(step: int, record: Mapping[str, Any], latest: int | None, out: Path) -> str:
    kept = f"the checkpoint of step {latest} in {out} is good" if latest is not None else "there was no checkpoint before it"
    return (
        f"the loss of step {step} is {record['loss']} with a gradient norm of {record['gradient_norm']}: {kept}. Lower --learning-rate, "
        "and look at the examples of that step."
    )
