"""Examples in rows of equal length: one behind the other, each of which sees itself alone, or one per row."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from maverick_jax.training.batch import Batch
from maverick_jax.training.data.examples import Example


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


def batch_of(rows: Sequence[Sequence[Example]], length: int, *, packed: bool) -> Batch:
    """Rows of examples as a batch, without their pictures.

    Args:
      length: tokens of a row.
      packed: whether a row may hold several examples.
    """
    shape = (len(rows), length)
    ids, target, document = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    weight, lengths = np.zeros(shape, np.float32), np.zeros(len(rows), np.int32)
    for row, examples in enumerate(rows):
        at = 0
        for number, example in enumerate(examples):
            end = at + len(example.ids)
            ids[row, at:end], document[row, at:end] = example.ids, number
            target[row, at : end - 1], weight[row, at : end - 1] = example.ids[1:], example.learned[1:]
            at = end
        lengths[row] = at
    return Batch(ids, lengths, target, weight, document if packed else None)
