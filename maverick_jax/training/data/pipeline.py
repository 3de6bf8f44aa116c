"""Batches in an order that a seed decides, made ahead of the step that takes them, from any step on.

Every process makes whole batches, of which its devices take their part: the order does not depend on how many there are.

Shape suffixes: A micro-batches, B rows, T tokens, N tiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from maverick_jax.errors import UserError
from maverick_jax.training.batch import Batch
from maverick_jax.training.data.examples import Example, Reading
from maverick_jax.training.data.packing import batch_of, pack

THREADS, AHEAD = 2, 4  # of batches
EPOCHS = 10**6  # without end: grain's own endless one is too long for batches of one row


@dataclasses.dataclass(frozen=True)
class Order:
    """How batches are made.

    Attributes:
      length: tokens of a row.
      rows: of a micro-batch.
      accumulate: micro-batches of a step.
      packing: several examples share a row.
      seed: of the order.
    """

    length: int
    rows: int
    accumulate: int = 1
    packing: bool = True
    seed: int = 0


class Batches:
    """An endless iterator over [A, B, T] batches; every epoch in an order of its own.

    Attributes:
      rows: how many there are in an epoch.
    """

    def __init__(self, examples: Sequence[Example], reading: Reading, order: Order):
        import grain

        self.examples, self.reading, self.order = examples, reading, order
        lengths = [len(example.ids) for example in examples]
        if not lengths:
            raise UserError("there are no examples to learn from.")
        self._rows = pack(lengths, order.length) if order.packing else [[index] for index in range(len(lengths))]
        self.rows = len(self._rows)
        taken = grain.MapDataset.range(self.rows).shuffle(seed=order.seed).repeat(EPOCHS).batch(order.rows * order.accumulate)
        self._iterator = iter(taken.map(self._make).to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)))

    def __next__(self) -> Batch:
        return next(self._iterator)

    def __iter__(self) -> Batches:
        return self

    @property
    def steps_per_epoch(self) -> float:
        return self.rows / (self.order.rows * self.order.accumulate)

    def state(self) -> dict[str, Any]:
        """Where it is; what was made ahead is made again."""
        return self._iterator.get_state()

    def go_to(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)

    def _make(self, chosen: np.ndarray) -> Batch:
        order, micro = self.order, np.asarray(chosen).reshape(self.order.accumulate, -1)
        found = [[[self.examples[i] for i in self._rows[row]] for row in rows] for rows in micro]
        batches = [batch_of(rows, order.length, packed=order.packing) for rows in found]
        stacked: Batch = jax.tree.map(lambda *parts: np.stack(parts), *batches)
        tiles = [sum(example.tiles for row in rows for example in row) for rows in found]
        if not any(example.tiles for example in self.examples):
            return stacked
        return stacked._replace(tiles_N3SS=np.stack([self._tiles(rows, _next_power_of_two(max(tiles))) for rows in found]))

    def _tiles(self, rows: Sequence[Sequence[Example]], count: int) -> np.ndarray:
        """All pictures' tiles, and zeros behind them: few numbers of tiles, few programs."""
        vision = self.reading.config.vision
        assert vision is not None
        out = np.zeros((count, vision.num_channels, vision.image_size, vision.image_size), np.float32)
        found = [tiles for row in rows for example in row for tiles in self.reading.tiles(example.pictures)]
        if found:
            joined = np.concatenate(found)
            out[: len(joined)] = joined
        return out


def _next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
