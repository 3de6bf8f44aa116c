"""Answers as batches of the trainer, with their sampler's experts, and what the model before training says of them.

Shape suffixes: A micro-batches (of an answer: its tokens), B rows, T tokens, M layers with experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maverick_jax.model import Llama4
from maverick_jax.training.asked import asked
from maverick_jax.training.batch import Batch, read
from maverick_jax.training.data.examples import Reading
from maverick_jax.training.data.packing import laid
from maverick_jax.training.data.rows import stacked, tiles_of
from maverick_jax.training.logits import log_probabilities, over_pieces
from maverick_jax.training.policy import Drawn
from maverick_jax.training.rollouts.sampling import Answer
from maverick_jax.training.split import Split


class Row(NamedTuple):
    """One answer, ready to be learned from; `pictures` and `tiles` as of `Example`."""

    prompt_ids: np.ndarray
    answer: Answer
    advantage: float
    pictures: tuple[Any, ...]
    tiles: int

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate([self.prompt_ids, self.answer.ids_A])

    def of_answer(self, values_A: np.ndarray) -> np.ndarray:
        """[len(ids) - 1] float32: a value where each token of the answer is predicted, 0 before."""
        return np.concatenate([np.zeros(len(self.prompt_ids) - 1, np.float32), np.asarray(values_A, np.float32)])


def batch_of(rows: Sequence[Row], reading: Reading, *, count: int, at_once: int, pictures: bool) -> Drawn:
    """[A, B, ...] rows.

    Args:
      count: of rows; those that are missing are there and count nothing.
      at_once: rows of a micro-batch.
      pictures: whether any prompt of the run has some.
    """
    present = np.arange(count) < len(rows)
    rows = [*rows, *[rows[0]] * (count - len(rows))]
    length = rounded(max(len(row.ids) for row in rows) - 1)
    micro = [[[row] for row in rows[at : at + at_once]] for at in range(0, count, at_once)]
    drawn: Drawn = stacked([_drawn(rows_B, length) for rows_B in micro])
    weight_ABT = drawn.batch.weight_BT * present.reshape(-1, at_once, 1)
    tiles = tiles_of(micro, reading) if pictures else None
    return drawn._replace(batch=drawn.batch._replace(weight_BT=weight_ABT, tiles_N3SS=tiles))


def _drawn(rows_B: Sequence[Sequence[Row]], length: int) -> Drawn:
    """Of a row all tokens but the last are read, and those of the answer learned."""
    experts = [[row.answer.expert_TM] for (row,) in rows_B if row.answer.expert_TM is not None]
    batch = Batch(
        ids_BT=laid(rows_B, length, lambda _, row: row.ids[:-1]),
        lengths_B=np.array([len(row.ids) - 1 for (row,) in rows_B], np.int32),
        target_BT=laid(rows_B, length, lambda _, row: row.ids[1:]),
        weight_BT=laid(rows_B, length, lambda _, row: row.of_answer(np.ones(len(row.answer.ids_A)))),
        expert_BTM=laid(experts, length, lambda _, expert_TM: expert_TM) if experts else None,
    )
    return Drawn(
        batch,
        advantage_BT=laid(rows_B, length, lambda _, row: row.of_answer(np.full(len(row.answer.ids_A), row.advantage))),
        sampled_BT=laid(rows_B, length, lambda _, row: row.of_answer(row.answer.logprob_A)),
    )


def rounded(length: int) -> int:
    """A length of rows, at most a quarter longer: few lengths, few programs."""
    step = max(8, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


class Reference:
    """The model as it is now, of which a trainer may use up what it learns: that is copied."""

    def __init__(self, model: Llama4):
        def likely(model: Llama4, batch: Batch) -> jax.Array:
            return over_pieces(model, read(model, batch)[0], log_probabilities, batch.target_BT)

        split = Split(model)
        self._likely = asked(split.model(jax.tree.map(jnp.copy, split.learned), split.frozen), likely)

    def __call__(self, batches: Batch) -> np.ndarray:
        """[A, B, T] float32 log-probability of every target; its own routers choose the experts."""
        return self._likely(batches._replace(expert_BTM=None))
