"""What changes a row's logits before one is drawn, and log-probabilities: penalties, biases, masks of a grammar.

Shape suffixes: B batch, S slots, V vocabulary, N likeliest tokens or biases of a row, W words of 32 tokens, E stop tokens of a row,
D tokens of a draft, T one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maverick_jax.inference.sampling.blocks import in_blocks
from maverick_jax.inference.sampling.rows import NO_ID, RowExtras
from maverick_jax.inference.sampling.settings import MOST_LOGPROBS

IN_PROMPT, ONE_MORE = 1, 2  # of a token's history: bit 0, and the rest of the bits, which count


class Extras(NamedTuple):
    """All that a draw may depend on beside logits and `RowSampling`.

    Attributes:
      rows: the settings.
      history_BV: int32; bit 0 says that the token stands in the prompt, the others how often in the answer.
      mask_BW: uint32, W = V / 32 rounded up: bit i of word j allows token 32 * j + i, as llguidance has it. None allows all.
    """

    rows: RowExtras
    history_BV: jax.Array
    mask_BW: jax.Array | None = None

    def along(self, draft_BD: jax.Array) -> Extras:
        """For every token of a draft and the one behind it, [B * T, ...]: as if all before it had been drawn.

        The mask is given for each of them, [B, T, W].
        """
        B, D = draft_BD.shape
        T = D + 1
        history_BTV = jnp.repeat(self.history_BV[:, None], T, axis=1)
        for t in range(1, T):
            history_BTV = history_BTV.at[:, t].set(record(history_BTV[:, t - 1], jnp.arange(B), draft_BD[:, t - 1]))
        return Extras(
            jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), T, axis=0), self.rows),
            history_BTV.reshape(B * T, -1),
            None if self.mask_BW is None else self.mask_BW.reshape(B * T, -1),
        )


def history_of(prompt: np.ndarray, new: Sequence[int], vocabulary: int) -> np.ndarray:
    """[V] int32, for a row that has these tokens so far. On the device: `history_SV.at[slot].set(...)`."""
    history_V = ONE_MORE * np.bincount(np.asarray(new, np.int64), minlength=vocabulary).astype(np.int32)
    history_V[prompt] |= IN_PROMPT
    return history_V


def record(history_SV: jax.Array, slot_B: jax.Array, token_B: jax.Array) -> jax.Array:
    """The histories of all slots after one more token in some of them; negative tokens and slots beyond the last are none."""
    token_B = jnp.where(token_B < 0, NO_ID, token_B)
    return history_SV.at[slot_B, token_B].add(ONE_MORE, mode="drop")


def adjust(logits_BV: jax.Array, step_B: jax.Array, extras: Extras) -> jax.Array:
    """[B, V] float32: the logits with bias and penalties; -inf for what may not be drawn.

    Args:
      step_B: int32, how many tokens the row has drawn before.

    Source: repetition penalty, Keskar et al. 2019 (CTRL), as in transformers; the other two, OpenAI's API reference.
    """
    rows, batch = extras.rows, jnp.arange(len(step_B))[:, None]
    logits_BV = logits_BV.at[batch, rows.bias_ids_BN].add(rows.bias_BN, mode="drop")
    times_BV = extras.history_BV >> 1
    penalty_B1 = jnp.asarray(rows.repetition_B)[:, None]
    repeated = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = jnp.where(extras.history_BV > 0, repeated, logits_BV)
    logits_BV -= times_BV.astype(jnp.float32) * rows.frequency_B[:, None]
    logits_BV -= jnp.where(times_BV > 0, rows.presence_B[:, None], 0.0)
    if extras.mask_BW is not None:
        bits = (extras.mask_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
        logits_BV = jnp.where(bits.reshape(len(step_B), -1)[:, : logits_BV.shape[1]] > 0, logits_BV, -jnp.inf)
    stop_ids_BE = jnp.where((step_B < rows.min_tokens_B)[:, None], rows.stop_ids_BE, NO_ID)
    return logits_BV.at[batch, stop_ids_BE].set(-jnp.inf, mode="drop")


def log_probabilities(logits_BV: jax.Array, token_B: jax.Array, extras: Extras) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the model itself says, whatever the settings: log-probabilities of the tokens and of the most likely ones.

    Returns:
      ([B] float32, [B, MOST_LOGPROBS] float32, [B, MOST_LOGPROBS] int32 ids), the most likely first; zeros where the whole
      batch asks for none.
    """
    count = min(MOST_LOGPROBS, logits_BV.shape[1])

    def not_asked():
        return jnp.zeros(len(token_B)), jnp.zeros((len(token_B), count)), jnp.zeros((len(token_B), count), jnp.int32)

    return lax.cond(jnp.any(extras.rows.logprobs_B >= 0), lambda: likelihoods(logits_BV, token_B), not_asked)


def likelihoods(logits_BV: jax.Array, token_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same, asked for."""
    top_BN, ids_BN = lax.top_k(logits_BV, min(MOST_LOGPROBS, logits_BV.shape[1]))
    exp_BNL = jnp.exp(in_blocks(logits_BV) - top_BN[:, :1, None])
    norm_B1 = top_BN[:, :1] + jnp.log(exp_BNL.sum(axis=-1).sum(axis=-1))[:, None]
    own_B1 = jnp.take_along_axis(logits_BV, jnp.maximum(token_B, 0)[:, None], axis=1)
    return (own_B1 - norm_B1)[:, 0], top_BN - norm_B1, ids_BN
