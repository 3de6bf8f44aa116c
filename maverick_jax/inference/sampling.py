"""From logits to a token: greedy, temperature, top-k, top-p, min-p; every row with its own settings.

Shape suffixes: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maverick_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: keep the k most likely tokens (None: all).
      top_p: then keep the most likely ones that together reach this probability (None: all).
      min_p: then keep those at least this fraction as likely as the most likely one (None: all).
      seed: same seed, same prompts, same tokens.

    Raises:
      UserError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        _require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "1 or more")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 2^32 - 1")


def _require(good: bool, name: str, value: float | None, expected: str) -> None:
    if not good:
        raise UserError(f"{name} is {value}: it must be {expected}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """`Sampling` of every row as arrays, so that other settings do not recompile anything."""

    temperature_B: jax.Array | np.ndarray
    top_k_B: jax.Array | np.ndarray
    top_p_B: jax.Array | np.ndarray
    min_p_B: jax.Array | np.ndarray
    seed_B: jax.Array | np.ndarray

    @classmethod
    def repeat(cls, sampling: Sampling, batch: int) -> RowSampling:
        """The same settings for every row; each row draws its own numbers."""
        no_limit = np.iinfo(np.int32).max
        return cls(
            np.full(batch, sampling.temperature, np.float32),
            np.full(batch, sampling.top_k or no_limit, np.int32),
            np.full(batch, 1.0 if sampling.top_p is None else sampling.top_p, np.float32),
            np.full(batch, sampling.min_p or 0.0, np.float32),
            (np.uint64(sampling.seed) + np.arange(batch, dtype=np.uint64) * np.uint64(0x9E3779B1)).astype(np.uint32),
        )


def sample(logits_BV: jax.Array, rows: RowSampling, step: jax.Array) -> jax.Array:
    """[B, V] float32 logits -> [B] int32 tokens. `step` numbers the draws of a row."""
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw():
        scaled = logits_BV / jnp.maximum(rows.temperature_B, 1e-6)[:, None]
        kept = jnp.where(scaled >= _threshold(scaled, rows)[:, None], scaled, -jnp.inf)
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(jnp.asarray(rows.seed_B))
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(rows.temperature_B > 0, drawn, greedy_B)

    return lax.cond(jnp.any(rows.temperature_B > 0), draw, lambda: greedy_B)


def _threshold(scaled_BV, rows):
    """[B] lowest logit that top-k, then top-p, then min-p keep. Each keeps a prefix of the sorted row, at least one token."""
    sorted_BV = -jnp.sort(-scaled_BV, axis=-1)
    rank = jnp.arange(sorted_BV.shape[1])[None, :]
    top_k = rank < rows.top_k_B[:, None]
    probability = jax.nn.softmax(jnp.where(top_k, sorted_BV, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = top_k & (before < rows.top_p_B[:, None]) & (probability >= rows.min_p_B[:, None] * probability[:, :1])
    last = jnp.maximum(kept.sum(axis=-1) - 1, 0)
    return jnp.take_along_axis(sorted_BV, last[:, None], axis=-1)[:, 0]
