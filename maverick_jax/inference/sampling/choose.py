"""From logits to tokens on the device, every row with its own settings; and how many tokens of a draft they agree with.

Shape suffixes: B batch, V vocabulary, T tokens of a draft and one more, N blocks, L neighbouring tokens of a block.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maverick_jax.inference.sampling.blocks import SHARES, block_sums, draw, first_highest, in_blocks
from maverick_jax.inference.sampling.extras import Extras, adjust, log_probabilities
from maverick_jax.inference.sampling.filters import Candidates, Weigh, among_all, among_candidates, may_be_few, needs_all
from maverick_jax.inference.sampling.rows import RowSampling

NOT_FINITE = -2  # in the place of a token whose logits are not finite
NOTHING_LEFT = -3  # in the place of a token where every one is forbidden


class Sampled(NamedTuple):
    """What was chosen.

    Attributes:
      token_B: int32; NOT_FINITE where a logit of the row is not finite, NOTHING_LEFT where every token is forbidden.
      logprob_B, top_logprobs_BN, top_ids_BN: see `log_probabilities`; None without extras.
    """

    token_B: jax.Array
    logprob_B: jax.Array | None = None
    top_logprobs_BN: jax.Array | None = None
    top_ids_BN: jax.Array | None = None


def sample(logits_BV: jax.Array, rows: RowSampling | None, step_B: jax.Array, extras: Extras | None = None) -> Sampled:
    """Choose a token for every row.

    What a row draws follows from its logits, its settings and its step alone, not from its place nor from who stands beside it.
    Greedy rows cost one look at every logit; a temperature adds one exponential of each, top-k and top-p a few thousand tokens
    looked at twice, and where they keep more than a hundred a few draws more.

    Args:
      logits_BV: float32.
      rows: None where all are greedy.
      step_B: int32, how many tokens the row has drawn before.
      extras: penalties, biases and what may not be drawn.
    """
    chosen_BNL = in_blocks(logits_BV)
    highest_BN = chosen_BNL.max(axis=-1)
    finite_B = jnp.isfinite(highest_BN.max(axis=-1)) & jnp.isfinite(chosen_BNL.min(axis=-1).min(axis=-1))
    if extras is not None:
        chosen_BNL = in_blocks(adjust(logits_BV, step_B, extras))
        highest_BN = chosen_BNL.max(axis=-1)
    token_B = greedy_B = first_highest(chosen_BNL, highest_BN)
    if rows is not None:
        warm_B = jnp.asarray(rows.temperature_B) > 0
        token_B = lax.cond(
            jnp.any(warm_B),
            lambda: jnp.where(warm_B, _drawn(chosen_BNL, highest_BN, rows, step_B), greedy_B),
            lambda: greedy_B,
        )
    token_B = jnp.where(jnp.isneginf(highest_BN.max(axis=-1)), NOTHING_LEFT, token_B)
    token_B = jnp.where(finite_B, token_B, NOT_FINITE)
    return Sampled(token_B) if extras is None else Sampled(token_B, *log_probabilities(logits_BV, token_B, extras))


def accept(
    logits_BTV: jax.Array, draft_BD: jax.Array, rows: RowSampling | None, step_B: jax.Array, extras: Extras | None = None
) -> tuple[jax.Array, Sampled]:
    """What the model says to a draft: the tokens that it would have drawn, one after the other, and how many of them count.

    Every token is drawn as without a draft, by the row's seed and the number of the draw, and the draft counts as far as it
    agrees: so a row's tokens are the same with and without drafts. Token t of a draft is taken with its probability p(t), and
    where it is not, the drawn token follows p without t: the best there is for a draft that is not itself drawn by chance.

    Args:
      logits_BTV: float32, T = D + 1: behind the newest token and behind every token of the draft.
      draft_BD: int32 tokens, negative where a row has no more of them.
      rows: None where all are greedy.
      step_B: how many tokens the row has drawn before.
      extras: as for `sample`, the masks [B, T, W].

    Returns:
      (count_B, sampled): int32 between 1 and T, and arrays [B, T, ...] of which the first `count` of every row count.
    """
    B, T, V = logits_BTV.shape
    along = jax.tree.map(lambda x_B: jnp.repeat(jnp.asarray(x_B), T, axis=0), rows)
    step_BT = step_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    extras = None if extras is None else extras.along(draft_BD)
    sampled = jax.tree.map(lambda x: x.reshape(B, T, *x.shape[1:]), sample(logits_BTV.reshape(-1, V), along, step_BT.reshape(-1), extras))
    agrees = (sampled.token_B[:, :-1] == draft_BD).astype(jnp.int32)
    return 1 + jnp.cumprod(agrees, axis=1).sum(axis=1, dtype=jnp.int32), sampled


def _drawn(logits_BNL, highest_BN, rows, step_B):
    """[B] int32: a token of every row by chance; anything for rows without a temperature."""
    top_B = highest_BN.max(axis=-1)
    keys_B = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(jnp.asarray(rows.seed_B), step_B)

    def shares(number):
        return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, number), (SHARES,)))(keys_B)

    weigh = Weigh(top_B, jnp.maximum(jnp.asarray(rows.temperature_B), 1e-6))
    warm_B = rows.temperature_B > 0
    filtered_B = warm_B & ((rows.top_k_B < logits_BNL[0].size) | jnp.isfinite(rows.top_p_B) | (rows.min_p_B > 0))

    def sums():
        return block_sums(logits_BNL, lambda logits, _: weigh(logits))

    first = jnp.any(warm_B & (~filtered_B | needs_all(rows)))
    sums_BN = lax.cond(first, sums, lambda: jnp.zeros((len(step_B), logits_BNL.shape[1])))
    of_all_B = sums_BN.sum(axis=-1)
    few = lax.cond(
        jnp.any(filtered_B & may_be_few(rows, of_all_B)),
        lambda: among_candidates(logits_BNL, highest_BN, weigh, rows, of_all_B, shares(0)),
        lambda: Candidates(jnp.zeros_like(step_B), jnp.zeros_like(warm_B)),
    )
    few_B = filtered_B & few.certain_B

    def among_more():
        more_BN = lax.cond(first, lambda: sums_BN, sums)
        token_B = draw(logits_BNL, lambda logits, _: weigh(logits), more_BN, shares(0))
        asked_B = filtered_B & ~few_B & jnp.isfinite(top_B)  # with NaN no token would ever be good enough
        kept = functools.partial(among_all, logits_BNL, highest_BN, token_B, more_BN, asked_B, weigh, rows, shares)
        return jnp.where(few_B, few.token_B, lax.cond(jnp.any(asked_B), kept, lambda: token_B))

    return lax.cond(jnp.any(warm_B & ~few_B), among_more, lambda: few.token_B)
