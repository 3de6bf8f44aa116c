"""What is not learned from, and tells when learning more makes it worse."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from maverick_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Batches to look at in between.

    Attributes:
      batches: a tree of [A, B, ...].
      every: steps from one look to the next.
      patience: looks in a row without a lower loss that end the run.
    """

    batches: Any
    every: int
    patience: int

    def is_over(self, losses: Mapping[int, float]) -> bool:
        """After looks that found these losses, by step."""
        since_best = [*losses.values()][[*losses.values()].index(min(losses.values())) + 1 :] if losses else []
        return len(since_best) >= self.patience


def apart(count: int, share: float, at_once: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of some rows are learned from, [L], and which are held out, [n, at_once].

    Raises:
      UserError: there are too few rows for a share of whole batches, one at least.
    """
    n = at_once * max(1, round(share * count / at_once))
    if n >= count:
        raise UserError(
            f"{count:,} rows are too few to hold out {n:,} of them (batches of {at_once}): hold out less, or make --batch smaller."
        )
    shuffled = np.random.default_rng(seed).permutation(count)
    return np.sort(shuffled[n:]), np.sort(shuffled[:n]).reshape(-1, at_once)
