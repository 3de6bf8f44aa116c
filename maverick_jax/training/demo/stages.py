"""The stages, each a run of the one trainer that begins with a copy of a model: SFT, RL by groups of answers, DPO."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maverick_jax.errors import UserError
from maverick_jax.inference.engine import Engine
from maverick_jax.model import Llama4
from maverick_jax.training.data.conversations import Conversation
from maverick_jax.training.data.examples import Example, Reading
from maverick_jax.training.data.pairs import Pair, PairRows, pair_of
from maverick_jax.training.data.pipeline import Batches, Order
from maverick_jax.training.data.rows import Conversations
from maverick_jax.training.demo.settings import Settings
from maverick_jax.training.next_token import NextToken
from maverick_jax.training.optimization import Optimization
from maverick_jax.training.policy import Policy
from maverick_jax.training.preference import Preference, reference
from maverick_jax.training.report import METRICS
from maverick_jax.training.rollouts.groups import Draws, Groups
from maverick_jax.training.rollouts.prompts import Prompt
from maverick_jax.training.rollouts.rewards import exact
from maverick_jax.training.rollouts.sampling import Sampler, draw
from maverick_jax.training.split import Split
from maverick_jax.training.trainer import Loop, train

WITHOUT_END = 100_000  # steps of what ends by the clock
RISING = 5  # steps of RL in which the rate does: Adam's first step is as long as the rate, whatever the gradient
BETA = 0.1
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Stages:
    """All that the stages share.

    Attributes:
      out: gets a run's directory per stage.
      told: takes a sentence that people should read.
    """

    settings: Settings
    reading: Reading
    engine: Engine
    out: Path
    seed: int
    told: Callable[[str], object]
    progress: bool

    def sft(self, model: Llama4, name: str, examples: Sequence[Example]) -> Llama4:
        """Learn right answers."""
        rows, settings = Conversations(examples, self.reading, self.settings.length, packing=False), self.settings
        data = Batches(rows, Order(settings.rows, seed=self.seed))
        steps = max(1, round(settings.epochs * data.steps_per_epoch))
        return self._train(model, name, NextToken(), data, Optimization(steps, settings.rates[0], warmup=0.1), self._loop())

    def rl(self, model: Llama4, name: str, prompts: Sequence[Prompt]) -> Llama4:
        """Learn from own answers until the time is over."""
        settings = self.settings
        draws = Draws(settings.prompts, settings.group, rows=min(settings.rows, settings.prompts * settings.group), seed=self.seed)
        data = Groups(prompts, Sampler(self._with, self.reading, max_new_tokens=settings.answer), exact, draws, self.told)
        optimization = Optimization(WITHOUT_END, settings.rates[1], "constant", warmup=RISING / WITHOUT_END)
        return self._train(model, name, Policy(), data, optimization, self._loop(until(settings.rl_seconds)))

    def dpo(self, model: Llama4, name: str, pairs: Sequence[Pair]) -> Llama4:
        """Prefer the chosen answers.

        Raises:
          UserError: there is no pair.
        """
        if not pairs:
            raise UserError("no question has a right and a wrong answer, from which DPO would learn: give the demo more --minutes.")
        settings, at_once = self.settings, min(self.settings.rows // 2, len(pairs))
        rows = PairRows(pairs, self.reading, settings.length)
        rows.reference_P2 = reference(model, rows, self.out / f"{name}-reference.npy", batch=at_once, progress=self.progress)
        data = Batches(rows, Order(at_once, seed=self.seed))
        steps = max(1, round(data.steps_per_epoch))
        return self._train(model, name, Preference(BETA), data, Optimization(steps, settings.rates[2]), self._loop())

    def pairs(self, model: Llama4, prompts: Sequence[Prompt]) -> list[Pair]:
        """A right and a wrong answer of the model's own to each question to which it gives both."""
        settings, found = self.settings, []
        groups = draw(self._with(model), prompts, self.reading, count=settings.group, max_new_tokens=settings.answer, seed=self.seed + 1)
        for prompt, answers in zip(prompts, groups, strict=True):
            texts = {worth: answer.text for answer in answers if (worth := exact(answer.text, prompt.line)) in (0.0, 1.0)}
            if len(texts) == 2:
                said = {name: [{"role": "assistant", "content": texts[worth]}] for name, worth in (("chosen", 1.0), ("rejected", 0.0))}
                found.append(pair_of(Conversation(prompt.number, prompt.line["messages"][:-1], None, said), self.reading))
        return found

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """What a stage said of its steps."""
        return [json.loads(line) for line in (self.out / name / METRICS).read_text().splitlines()]

    def _with(self, model: Llama4) -> Engine:
        self.engine.model = model
        return self.engine

    def _loop(self, stop: Callable[[int, Mapping[str, Any]], bool] = lambda step, record: False) -> Loop:
        return Loop(save_every=WITHOUT_END, keep=1, progress=self.progress, stop=stop)

    def _train(self, model: Llama4, name: str, objective: Any, data: Any, optimization: Optimization, loop: Loop) -> Llama4:
        return train(copied(model), objective, data, optimization, self.out / name, identity={"stage": name}, loop=loop)


def copied(model: Llama4) -> Llama4:
    """One whose training leaves this one as it is."""
    split = Split(model)
    return split.model(jax.tree.map(jnp.copy, split.learned), split.frozen)


def until(seconds: float) -> Callable[[int, Mapping[str, Any]], bool]:
    """`Loop.stop` after so much time of the processor in steps that compile nothing.

    Not time of the clock: what else runs on the machine must not decide which of two runs has more of it; nor must it be decided by
    which of them comes first and compiles for both.
    """
    programs, used = _compiled(), 0.0
    last, seen = math.inf, 0

    def is_over(step: int, record: Mapping[str, Any]) -> bool:
        nonlocal used, last, seen
        now = time.process_time()
        if len(programs) == seen:
            used += max(0.0, now - last)
        last, seen = now, len(programs)
        return used >= seconds

    return is_over


@functools.cache
def _compiled() -> list[str]:
    """Grows with every program that is compiled, or read from where they are kept."""
    programs: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            programs.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return programs
