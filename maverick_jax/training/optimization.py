"""AdamW with a schedule and clipped gradients, from settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from maverick_jax.config.checks import NOT_NEGATIVE, POSITIVE, Rule, check, number, one_of, whole

SCHEDULES = ("cosine", "linear", "constant")
LOWEST = 0.1  # of the highest rate, at the end
_SHARE = number("a number from 0 to below 1", lambda value: 0 <= value < 1)
_RULES: dict[str, Rule] = {
    "steps": whole(1, 1_000_000_000),
    "learning_rate": POSITIVE,
    "schedule": one_of(*SCHEDULES),
    "warmup": _SHARE,
    "weight_decay": NOT_NEGATIVE,
    "clip": POSITIVE,
    "b1": _SHARE,
    "b2": _SHARE,
}


@dataclasses.dataclass(frozen=True)
class Optimization:
    """How gradients become steps.

    Attributes:
      steps: of the whole run: where the schedule ends.
      learning_rate: the highest.
      schedule: how it falls after the warm-up, to a tenth: "cosine" or "linear"; or "constant".
      warmup: share of the steps in which it rises from 0.
      weight_decay: of matrices; norms and biases are left alone.
      clip: largest norm of all gradients together.
      b1, b2: AdamW's.

    Raises:
      UserError: names the setting, its value, and what it must be.
    """

    steps: int
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.95

    def __post_init__(self) -> None:
        check(dataclasses.asdict(self), _RULES)

    def rate(self, step: Any) -> Any:
        """Learning rate of the step after so many."""
        rising = round(self.warmup * self.steps)
        falling = max(1, self.steps - rising)
        if self.schedule == "cosine":
            after = optax.cosine_decay_schedule(self.learning_rate, falling, alpha=LOWEST)
        else:
            lowest = 1.0 if self.schedule == "constant" else LOWEST
            after = optax.linear_schedule(self.learning_rate, lowest * self.learning_rate, falling)
        if not rising:
            return after(step)
        return optax.join_schedules([optax.linear_schedule(0.0, self.learning_rate, rising), after], [rising])(step)

    def optimizer(self) -> optax.GradientTransformation:
        def matrices(leaves: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf.ndim > 1, leaves)

        adamw = optax.adamw(self.rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=matrices)
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw)
