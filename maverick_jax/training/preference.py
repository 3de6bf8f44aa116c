"""The objective of preference training: of two answers the chosen one is to gain more on the reference (DPO).

Sources: Rafailov et al. 2023, "Direct Preference Optimization", equation 7, https://arxiv.org/abs/2305.18290; smoothing: Mitchell 2023, "A
note on DPO with noisy preferences", equation 3, https://ericmitchell.ai/cdpo.pdf; lengths: Lambert et al. 2024, "Tulu 3", equation 6,
https://arxiv.org/abs/2411.15124. That Llama 4 had a light DPO stage is public, its settings are not.

Shape suffixes: B rows, T tokens, P pairs: rows 2p and 2p + 1 are pair p's chosen and rejected answer.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maverick_jax.config.checks import POSITIVE, check, number
from maverick_jax.model import Llama4
from maverick_jax.sharding import multihost
from maverick_jax.sharding.dispatch import Stats
from maverick_jax.training.asked import over_rows
from maverick_jax.training.batch import Array, Batch, read
from maverick_jax.training.data.pipeline import Rows
from maverick_jax.training.logits import log_probabilities, over_pieces
from maverick_jax.training.next_token import of_mixtures


class Pairs(NamedTuple):
    """Chosen and rejected answers in turn.

    Attributes:
      batch: an answer per row; `weight_BT` is 1 at the tokens of the answers.
      reference_B: float32, `score` of the rows by the model before training.
    """

    batch: Batch
    reference_B: Array

    @property
    def ids_BT(self) -> Array:
        return self.batch.ids_BT


@dataclasses.dataclass(frozen=True)
class Preference:
    """Mean of `-log sigmoid(beta * margin)` over pairs; the margin is how much more the chosen answer has gained on the reference.

    Attributes:
      beta: the higher, the closer to the reference it stays.
      smoothing: how many of the pairs are thought to be the wrong way round, from 0 to below 0.5.
      normalize: gains are per token, so that long answers count as much as short ones; takes a higher beta.

    Raises:
      UserError: names the setting, its value, and what it must be.
    """

    beta: float = 0.1
    smoothing: float = 0.0
    normalize: bool = False

    def __post_init__(self) -> None:
        check(
            dataclasses.asdict(self),
            {"beta": POSITIVE, "smoothing": number("a number from 0 to below 0.5", lambda share: 0 <= share < 0.5)},
        )

    def total(self, pairs: Pairs) -> jax.Array:
        return jnp.asarray(len(pairs.reference_B) / 2, jnp.float32)

    def __call__(self, model: Llama4, pairs: Pairs) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores_B, stats = score(model, pairs.batch)
        gain_B = scores_B - pairs.reference_B
        if self.normalize:
            gain_B /= jnp.asarray(pairs.batch.weight_BT).sum(axis=1)
        chosen_P, rejected_P = self.beta * gain_B[::2], self.beta * gain_B[1::2]
        margin_P = chosen_P - rejected_P
        lost_P = -(1 - self.smoothing) * jax.nn.log_sigmoid(margin_P) - self.smoothing * jax.nn.log_sigmoid(-margin_P)
        measures = {
            "preferred": (margin_P > 0).sum().astype(jnp.float32),
            "margin": margin_P.sum(),
            "chosen_reward": chosen_P.sum(),
            "rejected_reward": rejected_P.sum(),
        }
        return lost_P.sum(), {**measures, **of_mixtures(stats)}


def reference(model: Llama4, rows: Rows, file: Path, *, batch: int, progress: bool = False) -> np.ndarray:
    """[P, 2] float32: `score` of every pair's answers by the model as it is now; kept in a file, and read from it the next time.

    Args:
      rows: gives `Pairs`.
      batch: pairs at once.
    """
    if file.is_file():
        return np.load(file)

    def of_pairs(model: Llama4, pairs: Pairs) -> jax.Array:
        return score(model, pairs.batch)[0].reshape(-1, 2)

    found = np.concatenate([*over_rows(model, rows, of_pairs, batch=batch, what="reference", progress=progress)])
    if multihost.is_first():
        beside = file.with_name(f"{file.name}.new")
        with beside.open("wb") as stream:
            np.save(stream, found)
        beside.replace(file)
    return found


def score(model: Llama4, batch: Batch) -> tuple[jax.Array, tuple[Stats, ...]]:
    """[B] float32 log-probability of each row's tokens that count, and the stats of the mixtures."""
    hidden_BTD, stats = read(model, batch)
    logprob_BT = over_pieces(model, hidden_BTD, log_probabilities, batch.target_BT)
    return (batch.weight_BT * logprob_BT).sum(axis=1), stats
