"""Conversations as rows of a batch: packed or one each, with their pictures.

Shape suffixes: A micro-batches, B rows, N tiles, S pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from maverick_jax.training.batch import Batch
from maverick_jax.training.data.examples import Example, Reading
from maverick_jax.training.data.packing import batch_of, pack


class Conversations:
    """Rows of `length` tokens.

    Args:
      packing: several examples share a row.
    """

    def __init__(self, examples: Sequence[Example], reading: Reading, length: int, *, packing: bool = True):
        self.reading, self.length, self.packing = reading, length, packing
        packed = pack([len(example.ids) for example in examples], length) if packing else [[index] for index in range(len(examples))]
        self.rows = [[examples[index] for index in row] for row in packed]
        self.pictures = any(example.tiles for example in examples)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def learned_R(self) -> np.ndarray:
        """[R] tokens of each row that count."""
        return np.array([sum(np.count_nonzero(example.learned[1:]) for example in row) for row in self.rows])

    def __call__(self, rows_AB: np.ndarray) -> Batch:
        found = [[self.rows[row] for row in rows_B] for rows_B in rows_AB]
        batch = stacked([batch_of(rows, self.length, packed=self.packing) for rows in found])
        return batch._replace(tiles_N3SS=tiles_of(found, self.reading)) if self.pictures else batch


def stacked(batches: Sequence[Any]) -> Any:
    """Trees of [B, ...] as one of [A, B, ...]."""
    return jax.tree.map(lambda *parts: np.stack(parts), *batches)


class Pictured(Protocol):
    """`pictures` and `tiles` as of `Example`."""

    @property
    def pictures(self) -> tuple[Any, ...]: ...

    @property
    def tiles(self) -> int: ...


def tiles_of(micro: Sequence[Sequence[Sequence[Pictured]]], reading: Reading) -> np.ndarray:
    """[A, N, 3, S, S] float32: all pictures' tiles, and zeros behind them: few numbers of tiles, few programs."""
    vision = reading.config.vision
    assert vision is not None
    most = max(sum(example.tiles for row in rows for example in row) for rows in micro)
    out = np.zeros((len(micro), _next_power_of_two(most), vision.num_channels, vision.image_size, vision.image_size), np.float32)
    for of_batch, rows in zip(out, micro, strict=True):
        found = [tiles for row in rows for example in row for tiles in reading.tiles(example.pictures)]
        if found:
            joined = np.concatenate(found)
            of_batch[: len(joined)] = joined
    return out


def _next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
