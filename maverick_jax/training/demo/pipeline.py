"""base -> filter -> SFT -> RL -> DPO, with a control for every stage and the same questions for every model.

    stage               its control
    SFT on the hard     SFT on as many at random
    RL on the open      RL on all, for as long; both from the SFT stage
    DPO                 RL, from which it begins

"hard" is what the base does not answer right nearly always, "open" what it answers right neither always nor never.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from maverick_jax.assets import demo_adapter, mini_directory
from maverick_jax.checkpoint import load
from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.inference.engine import Engine
from maverick_jax.model import Llama4
from maverick_jax.training.data.files import reading_of
from maverick_jax.training.demo import evaluation, tasks
from maverick_jax.training.demo.settings import Settings
from maverick_jax.training.demo.stages import Stages
from maverick_jax.training.rollouts import filtering
from maverick_jax.training.rollouts.judges import Here
from maverick_jax.training.rollouts.rewards import exact

BASE_SEED, HELD_OUT_SEED, POOL_SEED = 1, 2, 3  # of questions; the base was trained on those of the first
LOADS = 256  # held-out questions whose tokens per expert are counted
CONTROL = {"sft": "sft random", "rl": "rl unfiltered", "dpo": "rl"}
BEFORE = {"sft": "base", "rl": "sft", "dpo": "base"}


def run(out: Path, settings: Settings, *, seed: int = 0, told: Callable[[str], object], progress: bool = False) -> dict[str, Any]:
    """The whole demo.

    Args:
      out: a directory that is not there yet: gets a run of the trainer per stage.
      seed: of the questions that are learned from, of their order, and of the answers that are drawn.
      told: takes a sentence that people should read.

    Returns:
      Of JSON: `stages`, the accuracy of every model by task; `comparisons`, of stages and controls; `tries`, pass@1 and pass@k of the base
      and the last model; `filter`, `curves` of both runs of RL, `loads`, `seconds`, and what it was made with.

    Raises:
      UserError: there is something in `out`.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} is there already: name a new directory.")
    out.mkdir(parents=True, exist_ok=True)
    return _Demo(out, settings, seed, told, progress).run()


class _Demo:
    """One run: `right` and `seconds` grow with every stage, by its name."""

    def __init__(self, out: Path, settings: Settings, seed: int, told: Callable[[str], object], progress: bool):
        self.out, self.settings, self.seed, self.told, self.progress = out, settings, seed, told, progress
        directory = mini_directory()
        self.reading = reading_of(directory, Config.from_directory(directory))
        self.base = load(directory, dtype="float32", adapter=demo_adapter(), training=True)
        queue = max(evaluation.AT_ONCE, filtering.AT_ONCE * settings.group, settings.preferred * settings.group)
        self.engine = Engine(self.base, slots=settings.slots, max_length=settings.length, queue=queue, routed_experts=True, paced=False)
        self.stages = Stages(settings, self.reading, self.engine, out, seed, told, progress)
        self.asked = tasks.questions(settings.held_out, HELD_OUT_SEED)
        self.prompts = tasks.prompts(self.asked, self.reading)
        self.right: dict[str, np.ndarray] = {}
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        settings, stages = self.settings, self.stages
        self._look("base", self.base)
        tries = {"base": self._tries("base", self.base)}

        pool = tasks.questions(settings.pool, (POOL_SEED, self.seed))
        prompts = tasks.prompts(pool, self.reading)
        scores = self._timed("filter", lambda: self._score("filter", self.base, prompts))
        half = settings.pool // 2
        hard = [score.line for score in scores[:half] if score.rate <= settings.easy]
        open_ = [score.line for score in scores[half:] if 0 < score.passes < score.answers]
        self.told(f"filter: {len(hard):,} of {half:,} questions are hard, {len(open_):,} of {len(scores) - half:,} are open")
        random = np.random.default_rng(self.seed).permutation(half)[: len(hard)]

        examples = tasks.examples(pool[:half], self.reading)
        self._stage("sft random", lambda: stages.sft(self.base, "sft random", [examples[n] for n in random]))
        sft = self._stage("sft", lambda: stages.sft(self.base, "sft", [examples[n] for n in hard]))
        self._stage("rl unfiltered", lambda: stages.rl(sft, "rl unfiltered", prompts[half:]))
        rl = self._stage("rl", lambda: stages.rl(sft, "rl", [prompts[n] for n in open_]))
        pairs = self._timed("pairs", lambda: stages.pairs(rl, [prompts[n] for n in hard][: settings.preferred]))
        self.told(f"pairs: {len(pairs):,} questions have a right and a wrong answer")
        dpo = self._stage("dpo", lambda: stages.dpo(rl, "dpo", pairs))
        tries["dpo"] = self._tries("dpo", dpo)

        some = tasks.examples(self.asked[:LOADS], self.reading)
        loads = {
            name: evaluation.loads(model, some, self.reading, length=settings.length).tolist()
            for name, model in (("base", self.base), ("dpo", dpo))
        }
        by_task = [question.task for question in self.asked]
        return {
            "seed": self.seed,
            "settings": dataclasses.asdict(settings),
            "made with": {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "Pillow")}
            | {"cores": os.cpu_count()},
            "stages": {name: evaluation.by_task(right_N, by_task) for name, right_N in self.right.items()},
            "comparisons": [
                {"stage": stage, "control": control, **evaluation.compared(self.right[stage], self.right[control])}
                for against in (CONTROL, BEFORE)
                for stage, control in against.items()
            ],
            "tries": tries,
            "filter": {"hard": len(hard), "open": len(open_), "passes": [score.passes for score in scores], "pairs": len(pairs)},
            "curves": {name: [_point(record) for record in stages.metrics(name)] for name in ("rl", "rl unfiltered")},
            "loads": loads,
            "seconds": self.seconds,
        }

    def _stage(self, name: str, make: Callable[[], Llama4]) -> Llama4:
        model = self._timed(name, make)
        self.told(f"{name}: {len(self.stages.metrics(name)):,} steps in {self.seconds[name]:.0f} s")
        self._look(name, model)
        return model

    def _look(self, name: str, model: Llama4) -> None:
        """Ask the held-out questions."""
        self.engine.model = model
        settings = {"max_new_tokens": self.settings.answer, "what": f"{name}, held out", "progress": self.progress}
        self.right[name] = self._timed(f"{name}, held out", lambda: evaluation.right(self.engine, self.prompts, self.reading, **settings))
        self.told(f"{name}: {self.right[name].mean():.1%} of {len(self.prompts):,} held-out questions")

    def _tries(self, name: str, model: Llama4) -> dict[str, float]:
        """pass@1 and pass@k."""
        prompts = self.prompts[: self.settings.tries]
        scores = self._timed(f"{name}, tries", lambda: self._score(f"{name} tries", model, prompts))
        return {f"pass@{k}": float(np.mean([score.pass_at(k) for score in scores])) for k in (1, self.settings.group)}

    def _score(self, name: str, model: Llama4, prompts: list[Any]) -> list[filtering.Score]:
        self.engine.model = model
        (self.out / name).mkdir()
        settings = self.settings
        return filtering.score(
            prompts,
            Here(self.engine, self.reading),
            exact,
            self.out / name,
            count=settings.group,
            max_new_tokens=settings.answer,
            seed=self.seed,
            told=self.told,
            progress=self.progress,
        )

    def _timed(self, name: str, do: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = do()
        self.seconds[name] = round(time.perf_counter() - began, 1)
        return found


def _point(record: dict[str, Any]) -> dict[str, float]:
    return {name: record[name] for name in ("step", "reward", "groups_drawn", "groups_without_advantage", "answer_tokens", "seconds")}
