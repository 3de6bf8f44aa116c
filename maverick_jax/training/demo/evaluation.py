"""How often a model is right, and whether another one is right more often: on the same questions, so that pairs are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import trange

from maverick_jax.inference.engine import Engine
from maverick_jax.inference.request import Request
from maverick_jax.inference.sampling import Sampling
from maverick_jax.model import Llama4
from maverick_jax.training.asked import asked as asked_of
from maverick_jax.training.batch import Batch, read
from maverick_jax.training.data.examples import Example, Reading
from maverick_jax.training.data.rows import Conversations
from maverick_jax.training.rollouts.prompts import Prompt
from maverick_jax.training.rollouts.rewards import exact

AT_ONCE = 256  # prompts whose tiles are in memory


def right(engine: Engine, prompts: Sequence[Prompt], reading: Reading, *, max_new_tokens: int, what: str, progress: bool) -> np.ndarray:
    """[N] bool: whether the likeliest answer to each prompt is the right one.

    Args:
      what: is asked, for the bar.
    """
    texts: list[str] = []
    for at in trange(0, len(prompts), AT_ONCE, desc=what, unit=f"{AT_ONCE} prompts", disable=None if progress else True):
        handles = engine.run(
            Request(
                ids=prompt.ids,
                tiles=np.concatenate(reading.tiles(prompt.pictures)),
                max_new_tokens=max_new_tokens,
                sampling=Sampling(temperature=0.0),
            )
            for prompt in prompts[at : at + AT_ONCE]
        )
        texts += [reading.tokenizer.decode(handle.tokens) for handle in handles]
    return np.array([exact(text, prompt.line) == 1 for text, prompt in zip(texts, prompts, strict=True)])


def by_task(right_N: np.ndarray, tasks: Sequence[str]) -> dict[str, float]:
    """Share of right answers, of each task and of all."""
    of_N = np.array(tasks)
    return {task: float(right_N[of_N == task].mean()) for task in dict.fromkeys(tasks)} | {"all": float(right_N.mean())}


def mcnemar(one: int, other: int) -> float:
    """Two-sided p of McNemar's exact test: how likely so uneven a split is, if both models are right equally often.

    Args:
      one, other: questions that only the one model, or only the other, answered right.

    Source: McNemar 1947, https://doi.org/10.1007/BF02295996; the binomial distribution of those pairs, without approximation.
    """
    n = one + other
    tail = sum(math.comb(n, k) for k in range(min(one, other) + 1))
    return min(1.0, tail / 2 ** (n - 1)) if n else 1.0


def compared(stage_N: np.ndarray, control_N: np.ndarray) -> dict[str, Any]:
    """Two models' right answers to the same questions."""
    only_stage, only_control = int((stage_N & ~control_N).sum()), int((control_N & ~stage_N).sum())
    return {
        "difference": float(stage_N.mean() - control_N.mean()),
        "only_stage": only_stage,
        "only_control": only_control,
        "p": mcnemar(only_stage, only_control),
    }


def loads(model: Llama4, asked: Sequence[Example], reading: Reading, *, length: int) -> np.ndarray:
    """[M, E] tokens that each expert of each mixture has, of questions and their right answers in one batch."""
    rows = Conversations(asked, reading, length, packing=False)

    def of_batch(model: Llama4, batch: Batch) -> Any:
        return jnp.stack([layer.load_E for layer in read(model, batch)[1]])

    return asked_of(model, of_batch)(rows(np.arange(len(rows))[None]))[0]
