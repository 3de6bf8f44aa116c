"""Examples in rows of equal length: one behind the other, each of which sees itself alone, or one per row.

Shape suffixes: B rows.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from maverick_jax.training.batch import Batch
from maverick_jax.training.data.examples import Example

Item = TypeVar("Item")


def pack(lengths: Sequence[int], room: int, *, most: int | None = None) -> list[list[int]]:
    """Rows of examples, by index: the longest first, each into the fullest row that has room for it (best fit decreasing).

    Args:
      lengths: tokens of every example, none more than `room`.
      most: examples per row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room left and row, in order
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(free, (lengths[index], 0))
        left, row = free.pop(at) if at < len(free) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if left > lengths[index] and (most is None or len(rows[row]) < most):
            bisect.insort(free, (left - lengths[index], row))
    return rows


def laid(rows: Sequence[Sequence[Item]], length: int, of_item: Callable[[int, Item], np.ndarray], *, empty: float = 0) -> np.ndarray:
    """[B, length, ...]: what `of_item(number in its row, item)` gives for an item's tokens, one item behind the other; then `empty`."""
    values = [[of_item(number, item) for number, item in enumerate(row)] for row in rows]
    sample = next(value for row in values for value in row)
    out = np.full((len(rows), length, *sample.shape[1:]), empty, sample.dtype)
    for row, parts in enumerate(values):
        if parts:
            joined = np.concatenate(parts)
            out[row, : len(joined)] = joined
    return out


def batch_of(rows: Sequence[Sequence[Example]], length: int, *, packed: bool) -> Batch:
    """Rows of examples, one of them at least, as a batch without their pictures.

    Args:
      length: tokens of a row.
      packed: whether a row may hold several examples.
    """
    return Batch(
        ids_BT=laid(rows, length, lambda _, example: example.ids),
        lengths_B=np.array([sum(len(example.ids) for example in row) for row in rows], np.int32),
        target_BT=laid(rows, length, lambda _, example: behind(example.ids)),
        weight_BT=laid(rows, length, lambda _, example: behind(example.learned).astype(np.float32)),
        document_BT=laid(rows, length, lambda number, example: np.full(len(example.ids), number, np.int32), empty=-1) if packed else None,
    )


def behind(values: np.ndarray) -> np.ndarray:
    """What the next token has, at every token but the last, which has zero."""
    return np.append(values[1:], np.zeros_like(values[:1]), axis=0)
