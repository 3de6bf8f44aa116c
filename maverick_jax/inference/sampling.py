"""From logits to a token: greedy, temperature, top-k, top-p, min-p; every row with its own settings.

Shape suffixes: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import Range, listed, real, whole

RANGES = {
    "temperature": Range(real, 0.0, float(np.finfo(np.float32).max), "a finite number, 0 (greedy) or more"),
    "top_k": Range(whole, 1, float("inf"), "a whole number, 1 or more"),
    "top_p": Range(real, np.nextafter(0.0, 1.0), 1.0, "a number above 0 and at most 1"),
    "min_p": Range(real, 0.0, 1.0, "a number between 0 and 1"),
}
SEED = Range(whole, 0, 2**32 - 1, "a whole number between 0 and 2^32 - 1, or a list of them, one per prompt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens. A chat's is `chat.sampling`, which may be replaced between two questions; `generate` takes the same
    settings by their names.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: keep the k most likely tokens (None: all). Of equally likely ones the lower ids come first.
      top_p: then keep the most likely ones that together reach this probability (None: all).
      min_p: then keep those at least this fraction as likely as the most likely one (None: all).
      seed: one per row, or one number s for all: then row i has seed s + i (modulo 2^32). What a row draws follows from its
        own seed, wherever it stands and whatever stands beside it.

    Raises:
      UserError: a value of another type or outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | Sequence[int] = 0

    def __post_init__(self):
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value is not None or name == "temperature":
                object.__setattr__(self, name, allowed.check(name, value))
        seeds = None if whole(self.seed) is not None else listed(self.seed)
        read = SEED.check("seed", self.seed) if seeds is None else tuple(SEED.check(f"seed {i}", s) for i, s in enumerate(seeds))
        object.__setattr__(self, "seed", read)

    def by_row(self, batch: int) -> list[Sampling]:
        """The same settings for every row, each with its own seed."""
        return [dataclasses.replace(self, seed=int(seed)) for seed in self.seeds(batch)]

    def seeds(self, batch: int) -> np.ndarray:
        """[B] uint32."""
        if isinstance(self.seed, int):
            return (np.uint64(self.seed) + np.arange(batch, dtype=np.uint64)).astype(np.uint32)
        if len(self.seed) != batch:
            raise UserError(f"seed has {len(self.seed)} numbers for {batch} prompts: give one per prompt, or a single one.")
        return np.array(self.seed, np.uint32)


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
    def empty(cls, rows: int) -> RowSampling:
        """Greedy rows, on the host."""
        zeros = np.zeros(rows, np.float32)
        return cls(
            zeros,
            np.full(rows, np.iinfo(np.int32).max, np.int32),
            np.full(rows, np.inf, np.float32),
            zeros.copy(),
            np.zeros(rows, np.uint32),
        )

    def set(self, row: int, sampling: Sampling) -> None:
        """(On the host) a row's settings, of one seed."""
        no_limit = np.iinfo(np.int32).max
        # What comes before the last tokens may add up to a little more than 1.
        all_tokens = sampling.top_p is None or sampling.top_p == 1
        self.temperature_B[row] = sampling.temperature
        self.top_k_B[row] = min(sampling.top_k or no_limit, no_limit)
        self.top_p_B[row] = np.inf if all_tokens else sampling.top_p
        self.min_p_B[row] = sampling.min_p or 0.0
        self.seed_B[row] = sampling.seed


def sample(logits_BV: jax.Array, rows: RowSampling, step_B: jax.Array) -> jax.Array:
    """[B, V] float32 logits -> [B] int32 tokens. `step_B` numbers the draws of each row."""
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw():
        scaled = logits_BV / jnp.maximum(rows.temperature_B, 1e-6)[:, None]
        kept = jnp.where(_kept(scaled, rows), scaled, -jnp.inf)
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(jnp.asarray(rows.seed_B), step_B)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(rows.temperature_B > 0, drawn, greedy_B)

    return lax.cond(jnp.any(rows.temperature_B > 0), draw, lambda: greedy_B)


def _kept(scaled_BV, rows):
    """[B, V] bool: the tokens that top-k, then top-p, then min-p keep.

    Each keeps a prefix of the row sorted from the most likely on, at least one token.
    """
    sorted_BV = -jnp.sort(-scaled_BV, axis=-1)
    rank = jnp.arange(sorted_BV.shape[1])[None, :]
    top_k = rank < rows.top_k_B[:, None]
    probability = jax.nn.softmax(jnp.where(top_k, sorted_BV, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = top_k & (before < rows.top_p_B[:, None]) & (probability >= rows.min_p_B[:, None] * probability[:, :1])
    count_B1 = jnp.maximum(kept.sum(axis=-1, keepdims=True), 1)
    last_B1 = jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1)
    # Of tokens as likely as the last one, those with the lowest ids: a stable sort puts them first.
    above, tied = scaled_BV > last_B1, scaled_BV == last_B1
    return above | (tied & (jnp.cumsum(tied, axis=-1) <= count_B1 - above.sum(axis=-1, keepdims=True)))
