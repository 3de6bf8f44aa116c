"""A student's own answers, and what a teacher in the same process says of them.

Source: Agarwal et al. 2023, "On-policy distillation of language models", https://arxiv.org/abs/2306.13649.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maverick_jax.errors import UserError
from maverick_jax.model import Llama4
from maverick_jax.training.asked import asked
from maverick_jax.training.distillation.objective import Taught
from maverick_jax.training.distillation.teachings import of_batch
from maverick_jax.training.rollouts.drawn import Row, batch_of
from maverick_jax.training.rollouts.prompts import Pool, Prompt
from maverick_jax.training.rollouts.sampling import Sampler


class OnPolicy:
    """What the trainer takes: an answer to each of `rows * accumulate` prompts, drawn from the student as it is then.

    Args:
      k: of the teacher's likeliest tokens.
      rows: of a micro-batch.
    """

    def __init__(
        self, prompts: Sequence[Prompt], sampler: Sampler, teacher: Llama4, *, k: int, rows: int, accumulate: int = 1, seed: int = 0
    ):
        if len(prompts) < rows * accumulate:
            raise UserError(f"there are {len(prompts):,} prompts for {rows * accumulate:,} rows of a step: lower --batch or --accumulate.")
        self.prompts, self.sampler = prompts, sampler
        self._rows, self._count, self._seed = rows, rows * accumulate, seed
        self._pool, self._step = Pool(len(prompts), seed), 0
        self._pictures = any(prompt.tiles for prompt in prompts)
        self._expected = asked(teacher, lambda model, batch: of_batch(model, batch, k))

    def take(self, model: Callable[[], Llama4]) -> tuple[Taught, dict[str, Any]]:
        """Answers of the student as it is now, all of whose targets are the teacher's."""
        began = time.perf_counter()
        chosen = [self.prompts[number] for number in self._pool.take(self._count, self._step)]
        answers = self.sampler(model(), chosen, count=1, seed=self._seed + self._step)
        rows = [Row(prompt.ids, answer, 0.0, prompt.pictures, prompt.tiles) for prompt, (answer,) in zip(chosen, answers, strict=True)]
        self._step += 1
        drawing = time.perf_counter() - began
        batch = batch_of(rows, self.sampler.reading, count=self._count, at_once=self._rows, pictures=self._pictures).batch
        said = {"answer_tokens": float(np.mean([len(row.answer.ids_A) for row in rows])), "seconds_drawing": round(drawing, 4)}
        soft_AB = np.ones(batch.lengths_B.shape, np.float32)
        return Taught(batch, self._expected(batch._replace(expert_BTM=None)), soft_AB), said

    def state(self) -> dict[str, Any]:
        return {"step": self._step, "pool": self._pool.state()}

    def go_to(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self._pool.go_to(state["pool"])
