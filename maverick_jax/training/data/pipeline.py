"""Batches in an order that a seed decides, made ahead of the step that takes them, from any step on.

Every process makes whole batches, of which its devices take their part: the order does not depend on how many there are.

Shape suffixes: A micro-batches, B rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from maverick_jax.errors import UserError

THREADS, AHEAD = 2, 4  # of batches
EPOCHS = 10**6  # without end: grain's own endless one is too long for batches of one row


class Rows(Protocol):
    """All there is to learn from, as rows that do not depend on each other."""

    def __len__(self) -> int:
        """How many there are in an epoch."""
        ...

    def __call__(self, rows_AB: np.ndarray) -> Any:
        """These rows as a tree of [A, B, ...]."""
        ...


@dataclasses.dataclass(frozen=True)
class Order:
    """How rows come.

    Attributes:
      rows: of a micro-batch.
      accumulate: micro-batches of a step.
      seed: of the order.
    """

    rows: int
    accumulate: int = 1
    seed: int = 0


class Batches:
    """[A, B, ...] batches without end; every epoch in an order of its own.

    Args:
      chosen: which of the rows it has; None: all.
    """

    def __init__(self, rows: Rows, order: Order, chosen: np.ndarray | None = None):
        import grain

        chosen = np.arange(len(rows)) if chosen is None else chosen
        if not len(chosen):
            raise UserError("there are no examples to learn from.")
        self.steps_per_epoch = len(chosen) / (order.rows * order.accumulate)

        def make(places: np.ndarray) -> Any:
            return rows(chosen[np.asarray(places)].reshape(order.accumulate, order.rows))

        taken = grain.MapDataset.range(len(chosen)).shuffle(seed=order.seed).repeat(EPOCHS).batch(order.rows * order.accumulate)
        self._iterator = iter(taken.map(make).to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)))

    def take(self, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """The next one, whatever the model; there is nothing to say of it."""
        return next(self._iterator), {}

    def state(self) -> dict[str, Any]:
        """Where it is; what was made ahead is made again."""
        return self._iterator.get_state()

    def go_to(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)
