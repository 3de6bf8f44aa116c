"""Data of reinforcement: groups of answers to the same prompts, each worth more or less than its group.

Source: Shao et al. 2024, "DeepSeekMath" (GRPO), section 4.1, https://arxiv.org/abs/2402.03300: the advantage is the reward less the mean of
its group, in standard deviations. Groups whose answers are all worth the same teach nothing and are drawn again: Yu et al. 2025, "DAPO",
section 3.2, https://arxiv.org/abs/2503.14476. Llama 4 dropped prompts without advantage as well, as Meta's post of April 2025 says.

Shape suffixes: G answers of a group.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maverick_jax.errors import UserError
from maverick_jax.model import Llama4
from maverick_jax.training.policy import Drawn
from maverick_jax.training.rollouts.drawn import Reference, Row, batch_of
from maverick_jax.training.rollouts.prompts import Pool, Prompt
from maverick_jax.training.rollouts.rewards import BadReward, Reward, worth
from maverick_jax.training.rollouts.sampling import Answer, Sampler

LEAST_SPREAD = 1e-4  # added to the standard deviation
BAD_IN_A_ROW = 3  # groups whose reward failed


@dataclasses.dataclass(frozen=True)
class Draws:
    """How answers are drawn.

    Attributes:
      prompts: of a step, each with a group.
      group: answers to a prompt.
      rest: steps for which a prompt whose answers were all worth the same is left alone, before it is tried again.
      refills: times that others are drawn for groups that teach nothing, in one step.
      rows: of a micro-batch.
      seed: of the order of prompts and of the answers.
    """

    prompts: int = 8
    group: int = 8
    rest: int = 50
    refills: int = 4
    rows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"a group has {self.group} answers: to be compared it must have 2 or more.")
        if self.prompts * self.group % self.rows:
            raise UserError(f"a step has {self.prompts} x {self.group} answers: choose a --batch that divides them, not {self.rows}.")


class Groups:
    """What the trainer takes, drawn by an engine that has the trainer's own weights.

    Args:
      reward: what an answer is worth.
      told: takes a sentence that people should read.
      reference: the model before training, where the objective asks for it.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampler: Sampler,
        reward: Reward,
        draws: Draws,
        told: Callable[[str], object],
        reference: Reference | None = None,
    ):
        self.prompts, self.sampler, self.reward, self.draws = prompts, sampler, reward, draws
        self._told, self._reference = told, reference
        self._pool = Pool(len(prompts), draws.seed)
        self._step, self._bad = 0, 0
        self._pictures = any(prompt.tiles for prompt in prompts)

    def state(self) -> dict[str, Any]:
        return {"step": self._step, "bad": self._bad, "pool": self._pool.state()}

    def go_to(self, state: dict[str, Any]) -> None:
        self._step, self._bad = state["step"], state["bad"]
        self._pool.go_to(state["pool"])

    def take(self, model: Callable[[], Llama4]) -> tuple[Drawn, dict[str, Any]]:
        """Groups of answers by the model as it is now.

        Raises:
          UserError: no prompt has answers that are worth more than others; the reward failed for three groups in a row.
        """
        began, draws = time.perf_counter(), self.draws
        now = model()
        rows: list[Row] = []
        tried, rewards, tokens = 0, [], 0
        for attempt in range(1 + draws.refills):
            missing = draws.prompts - len(rows) // draws.group
            chosen = self._pool.take(missing, self._step) if missing else []
            if not chosen:
                break
            seed = draws.seed + 1_000_003 * (self._step * (1 + draws.refills) + attempt)
            asked = [self.prompts[number] for number in chosen]
            groups = self.sampler(now, asked, count=draws.group, seed=seed)
            for number, prompt, answers in zip(chosen, asked, groups, strict=True):
                tokens += sum(len(answer.ids_A) for answer in answers)
                reward_G = self._worth(prompt, answers)
                if reward_G is None:
                    continue
                tried += 1
                rewards.append(reward_G)
                if np.ptp(reward_G) == 0:
                    self._pool.rest(number, self._step + draws.rest)
                    continue
                advantage_G = (reward_G - reward_G.mean()) / (reward_G.std(ddof=1) + LEAST_SPREAD)
                rows += [
                    Row(prompt.ids, answer, float(advantage), prompt.pictures, prompt.tiles)
                    for answer, advantage in zip(answers, advantage_G, strict=True)
                ]
        self._step += 1
        if not rows:
            raise UserError(
                f"none of {tried:,} prompts has answers of different worth, in step {self._step}: all are right, or all wrong. Filter the "
                "prompts (maverick train filter), or give a reward that tells answers apart."
            )
        said = {
            "reward": float(np.mean(rewards)),
            "groups_drawn": tried,
            "groups_without_advantage": tried - len(rows) // draws.group,
            "resting": sum(until > self._step for until in self._pool.until.values()),
            "answer_tokens": round(tokens / max(1, tried * draws.group), 2),
            "seconds_drawing": round(time.perf_counter() - began, 4),
        }
        drawn = batch_of(rows, self.sampler.reading, count=draws.prompts * draws.group, at_once=draws.rows, pictures=self._pictures)
        return drawn if self._reference is None else drawn._replace(reference_BT=self._reference(drawn.batch)), said

    def _worth(self, prompt: Prompt, answers: Sequence[Answer]) -> np.ndarray | None:
        """[G] float64; None where the reward failed."""
        try:
            found = np.array([worth(self.reward, answer.text, prompt.line) for answer in answers])
        except BadReward as error:
            self._bad += 1
            reason = f"{prompt.name}: {error}"
            if self._bad >= BAD_IN_A_ROW:
                raise UserError(f"{reason} ({self._bad} prompts in a row.)") from error
            self._told(f"{reason} The group is dropped.")
            return None
        self._bad = 0
        return found
