"""Settings of every row as arrays, so that other settings do not recompile anything.

Shape suffixes: B batch, N biases of a row, E stop tokens of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from maverick_jax.inference.sampling.settings import MOST_BIASES, Sampling

MOST_STOPS = 32
NO_ID = np.iinfo(np.int32).max  # in the place of a token id where there is none: no array reaches so far


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """What turns logits into a token: as in `Sampling`, None being what keeps everything."""

    temperature_B: jax.Array | np.ndarray
    top_k_B: jax.Array | np.ndarray
    top_p_B: jax.Array | np.ndarray
    min_p_B: jax.Array | np.ndarray
    seed_B: jax.Array | np.ndarray

    @classmethod
    def repeat(cls, sampling: Sampling, batch: int) -> RowSampling:
        """The same settings for every row, each with its own seed."""
        no_limit = np.iinfo(np.int32).max
        # What comes before the last tokens may add up to a little more than 1; and a float32 of 0 would keep no token.
        top_p = max(np.float32(1.0 if sampling.top_p is None else sampling.top_p), np.finfo(np.float32).tiny)
        return cls(
            np.full(batch, sampling.temperature, np.float32),
            np.full(batch, min(sampling.top_k or no_limit, no_limit), np.int32),
            np.full(batch, np.inf if top_p == 1 else top_p, np.float32),
            np.full(batch, sampling.min_p or 0.0, np.float32),
            sampling.seeds(batch),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowExtras:
    """What `Sampling` asks for beside that.

    Attributes:
      repetition_B, presence_B, frequency_B: float32 penalties.
      bias_ids_BN, bias_BN: int32 tokens and the float32 that their logits gain.
      min_tokens_B: int32, how many draws no stop token may come from.
      stop_ids_BE: int32.
      logprobs_B: int32, -1 where none are asked for.
    """

    repetition_B: jax.Array | np.ndarray
    presence_B: jax.Array | np.ndarray
    frequency_B: jax.Array | np.ndarray
    bias_ids_BN: jax.Array | np.ndarray
    bias_BN: jax.Array | np.ndarray
    min_tokens_B: jax.Array | np.ndarray
    stop_ids_BE: jax.Array | np.ndarray
    logprobs_B: jax.Array | np.ndarray

    @classmethod
    def repeat(cls, sampling: Sampling, batch: int, stop_ids: Sequence[int] = ()) -> RowExtras:
        """The same settings for every row. Of the stop tokens the first MOST_STOPS are kept away by `min_tokens`."""
        bias = sampling.logit_bias or {}
        ids, values = np.full((batch, MOST_BIASES), NO_ID, np.int32), np.zeros((batch, MOST_BIASES), np.float32)
        ids[:, : len(bias)], values[:, : len(bias)] = list(bias), list(bias.values())
        stops = np.full((batch, MOST_STOPS), NO_ID, np.int32)
        stops[:, : len(stop_ids)] = list(stop_ids)[:MOST_STOPS]
        return cls(
            np.full(batch, sampling.repetition_penalty, np.float32),
            np.full(batch, sampling.presence_penalty, np.float32),
            np.full(batch, sampling.frequency_penalty, np.float32),
            ids,
            values,
            np.full(batch, min(sampling.min_tokens, NO_ID), np.int32),
            stops,
            np.full(batch, -1 if sampling.logprobs is None else sampling.logprobs, np.int32),
        )
