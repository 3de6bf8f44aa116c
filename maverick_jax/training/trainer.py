"""The loop: take a batch, make a step, say how it went, keep what was learned. One for every kind of training.

RUN/run.json        what a run is; the same command goes on with it, another is refused
RUN/checkpoints/    the last few, by Orbax
RUN/metrics.jsonl   a line per step; RUN/tensorboard/ the same as curves
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import PartitionSpec

from maverick_jax.config.checks import show
from maverick_jax.errors import UserError
from maverick_jax.json_file import read_json
from maverick_jax.model import Llama4
from maverick_jax.sharding import multihost
from maverick_jax.sharding.layout import Constrain
from maverick_jax.training.checkpoints import Checkpoints
from maverick_jax.training.optimization import Optimization
from maverick_jax.training.report import Report, summarize
from maverick_jax.training.split import Split
from maverick_jax.training.step import Objective, begin, compile_update, make_update

RUN, CHECKPOINTS = "run.json", "checkpoints"
REMAT = {"none": None, "products": jax.checkpoint_policies.dots_saveable, "layers": jax.checkpoint_policies.nothing_saveable}


class Data(Protocol):
    """Batches without end, in an order that can be taken up anywhere."""

    def __next__(self) -> Any: ...

    def state(self) -> dict[str, Any]: ...

    def go_to(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Loop:
    """How a run goes on, which changes nothing of what it learns.

    Attributes:
      save_every: steps between checkpoints.
      keep: checkpoints that stay.
      remat: of `REMAT`: what the backward pass makes again, "layers" all within a layer, "products" all but products.
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
    frozen: Sequence[str] = (),
    master: bool = False,
) -> Llama4:
    """Learn until `optimization.steps` are made, from where an earlier call with the same arguments stopped, however it ended.

    Args:
      model: its learned arrays are used up; quantized weights, and all others where it has adapters, stay.
      data: gives trees of [A, B, ...], for A micro-batches.
      out: the run's directory.
      identity: what this run must have in common with what is there, in words or numbers.
      frozen, master: as of `Split`.

    Returns:
      The model with what was learned.

    Raises:
      UserError: the run there is another one; a loss that is no number; no room on the disk.
    """
    model.text.remat = REMAT[loop.remat]
    split, optimizer = Split(model, frozen=frozen, master=master), optimization.optimizer()
    _check_run(out, {**identity, **_shapes(split), **{f"optimizer {k}": v for k, v in dataclasses.asdict(optimization).items()}})
    progress = begin(split, optimizer)
    checkpoints = Checkpoints(out / CHECKPOINTS, keep=loop.keep)
    done = checkpoints.latest or 0
    if done:
        progress = checkpoints.load(done, progress)
        data.go_to(checkpoints.beside(done)["data"])
    update = compile_update(make_update(split, objective, optimizer), progress)
    report = Report(out, steps=optimization.steps, done=done, progress=loop.progress) if multihost.is_first() else None
    try:
        for step in range(done + 1, optimization.steps + 1):
            batch = next(data)
            place = data.state()
            progress, measures = update(progress, split.frozen, laid_out(model, batch))
            record = summarize(jax.tree.map(np.asarray, measures))
            if not math.isfinite(record["loss"]) or not math.isfinite(record["gradient_norm"]):
                raise UserError(_not_finite(step, record, checkpoints.latest, out))
            record["learning_rate"] = float(optimization.rate(step - 1))
            if report is not None:
                report.step(step, record, tokens=batch.ids_BT.size, flops=loop.flops_per_step, peak=loop.peak_flops)
            last = step == optimization.steps or loop.stop(step, record)
            if last or step % loop.save_every == 0:
                checkpoints.save(step, progress, {"data": place})
            if last:
                break
    finally:
        checkpoints.close()
        if report is not None:
            report.close()
    return split.model(progress.learned, split.frozen)


def laid_out(model: Llama4, batch: Any) -> Any:
    """A batch of [A, B, ...] on the model's devices: rows divided as the layout divides batches."""
    if not isinstance(model.constrain, Constrain):
        return batch
    constrain = model.constrain

    def place(array: np.ndarray) -> jax.Array:
        rows = constrain.layout.spec(("batch",), array.shape[1:2], constrain.mesh)
        sharding = jax.NamedSharding(constrain.mesh, PartitionSpec(None, *rows))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, batch)


def _shapes(split: Split) -> dict[str, Any]:
    return {"number of learned parameters": len(split.learned), **{name: [*split.learned[name].shape] for name in sorted(split.learned)}}


def check_place(out: Path) -> None:
    """Refuse a directory that holds something else than a run, before anything is read."""
    if out.is_file():
        raise UserError(f"{out} is a file: name the directory of a run.")
    if out.is_dir() and any(out.iterdir()) and not (out / RUN).is_file():
        raise UserError(f"{out} exists and is no run: name a new directory.")


def _check_run(out: Path, identity: Mapping[str, Any]) -> None:
    """Begin a run, or see that the one that is there is this one."""
    check_place(out)
    file, mine = out / RUN, json.loads(json.dumps(identity))
    if file.is_file():
        there = read_json(file)
        for name in {**there, **mine}:
            if there.get(name) != mine.get(name):
                raise UserError(
                    f"{out} is a run with another {name}: {show(there.get(name))} there, {show(mine.get(name))} now. Name a new directory, "
                    "or run the command that began it."
                )
        return
    if multihost.is_first():
        out.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".new")
        beside.write_text(json.dumps(mine, indent=1) + "\n")
        beside.replace(file)


def _not_finite(step: int, record: Mapping[str, Any], latest: int | None, out: Path) -> str:
    kept = f"the checkpoint of step {latest} in {out} is good" if latest is not None else "there was no checkpoint before it"
    return (
        f"the loss of step {step} is {record['loss']} with a gradient norm of {record['gradient_norm']}: {kept}. Lower --learning-rate, "
        "and look at the examples of that step."
    )
