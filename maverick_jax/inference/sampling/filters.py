"""Top-k, top-p and min-p: draw among the tokens that they keep, and sort no vocabulary for it.

Tokens stand in an order: the most likely first, of equally likely ones the lower ids first. Each filter keeps a beginning of it.
Mostly that lies among a few candidates, which come from the blocks with the highest maxima. Where it does not, tokens are drawn
from all, and whoever draws one that is not kept draws again from those before it: all that are kept are among them, and none of
them has become more likely beside the others. What comes before a token is summed to see whether the token is kept, and the same
sums say where the next one is drawn.

Shape suffixes: B batch, V vocabulary, N blocks, L neighbouring tokens of a block, C candidates, U numbers by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maverick_jax.inference.sampling.blocks import block_of, block_sums, draw, draw_at_once, ids_in_blocks, per_row
from maverick_jax.inference.sampling.rows import RowSampling

CANDIDATES = 128


class Weigh(NamedTuple):
    """From logits [B, ...] to weights: probabilities but for a factor per row.

    Attributes:
      top_B: the largest logit.
      temperature_B: above 0.
    """

    top_B: jax.Array
    temperature_B: jax.Array

    def __call__(self, logits: jax.Array) -> jax.Array:
        return jnp.exp((logits - per_row(self.top_B, logits)) / per_row(self.temperature_B, logits))


class Candidates(NamedTuple):
    """What was drawn among the likeliest tokens.

    Attributes:
      token_B: int32.
      certain_B: bool; does `token_B` count? If not, the filters keep more than the candidates, or it cannot be told.
    """

    token_B: jax.Array
    certain_B: jax.Array


def among_candidates(
    logits_BNL: jax.Array, highest_BN: jax.Array, weigh: Weigh, rows: RowSampling, of_all_B: jax.Array, shares_BU: jax.Array
) -> Candidates:
    """Draw from what the filters keep, if that can be found among the likeliest tokens.

    Args:
      logits_BNL: float32.
      highest_BN: the largest logit of every block.
      of_all_B: the weights of all tokens; matters for rows of which `needs_all` says so.
      shares_BU: see `draw`.
    """
    B, N, L = logits_BNL.shape
    if N > CANDIDATES + 1:
        # One block more than candidates: what is above the lowest of their maxima is certain, all but the last of them at least.
        maxima, block = lax.top_k(highest_BN, CANDIDATES + 1)
        block = jnp.sort(block, axis=-1)  # equal candidates stand in the order of their ids
        beyond_B = maxima.min(axis=-1)
    else:
        block, beyond_B = jnp.broadcast_to(jnp.arange(N), (B, N)), jnp.full(B, -jnp.inf)
    near = jnp.take_along_axis(logits_BNL, block[:, :, None], axis=1).reshape(B, -1)
    count = min(CANDIDATES, near.shape[1])
    logit_BC, place_BC = lax.top_k(jnp.where(near == 0, 0.0, near), count)  # which does not take -0.0 and 0.0 for equal
    weight_BC = weigh(logit_BC)
    in_k = jnp.arange(count)[None, :] < rows.top_k_B[:, None]
    few = jnp.asarray(rows.top_k_B) <= count
    total_B = jnp.where(few, jnp.where(in_k, weight_BC, 0).sum(axis=-1), of_all_B)
    before_BC = jnp.cumsum(weight_BC, axis=-1) - weight_BC
    in_p = jnp.isinf(rows.top_p_B)[:, None] | (before_BC < (rows.top_p_B * total_B)[:, None])
    kept = in_k & in_p & (weight_BC >= rows.min_p_B[:, None])
    of_all = (rows.top_k_B >= N * L) | jnp.isinf(rows.top_p_B)  # or top-p is a share of what top-k keeps, and that is not known
    ended = few | (of_all & ~kept[:, -1]) | (count == N * L)
    needed = kept | (in_k & few[:, None])
    certain_B = ended & ((weigh(beyond_B[:, None])[:, 0] == 0) | (~needed | (logit_BC > beyond_B[:, None])).all(axis=-1))
    pick_B1 = draw_at_once(jnp.where(kept, weight_BC, 0), shares_BU)[:, None]
    place_B1 = jnp.take_along_axis(place_BC, pick_B1, axis=1)
    token_B1 = jnp.take_along_axis(block, place_B1 // L, axis=1) * L + place_B1 % L
    return Candidates(token_B1[:, 0].astype(jnp.int32), certain_B)


def needs_all(rows: RowSampling) -> jax.Array:
    """[B] bool: even where a row keeps no more than candidates, the weights of all tokens say how many."""
    return (jnp.asarray(rows.top_k_B) > CANDIDATES) & jnp.isfinite(rows.top_p_B)


def may_be_few(rows: RowSampling, of_all_B: jax.Array) -> jax.Array:
    """[B] bool: can what a row's filters keep lie among the candidates? `of_all_B` as for `among_candidates`; no weight is above 1."""
    few_in_p = jnp.isfinite(rows.top_p_B) & (rows.top_p_B * of_all_B < CANDIDATES)
    return few_in_p | (rows.top_k_B <= CANDIDATES) | (rows.min_p_B > 0)


def among_all(
    logits_BNL: jax.Array,
    highest_BN: jax.Array,
    token_B: jax.Array,
    sums_BN: jax.Array,
    asked_B: jax.Array,
    weigh: Weigh,
    rows: RowSampling,
    shares: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """[B] int32: tokens that all filters keep, from tokens drawn without any.

    On average each draw again halves what is still to be refused. Mostly few rows come here, so it is done for one after the other.

    Args:
      logits_BNL: float32.
      highest_BN: the largest logit of every block.
      token_B: drawn from all tokens by their weights.
      sums_BN: of those weights, by blocks.
      asked_B: bool, the rows that have filters; their logits are finite.
      shares: from the number of the draw, 1 and up, to new numbers by chance [B, U].
    """
    total_B = _before_top_p(logits_BNL, sums_BN, asked_B, weigh, rows)
    asked_B &= ~surely_kept(logits_BNL, highest_BN, token_B, sums_BN, weigh, rows)

    def judge(carry):
        number, token_B, asked_B = carry
        row = jnp.argmax(asked_B)
        here = (logits_BNL, token_B, total_B, weigh, rows, shares(number))
        logits_1NL, token_1, total_1, weigh_1, rows_1, shares_1U = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(jnp.asarray(x), row, 1), here
        )
        kept_1, before_1N = judged(logits_1NL, token_1, total_1, weigh_1, rows_1)
        next_1 = draw(logits_1NL, _weigh_before(_logit_of(logits_1NL, token_1), token_1, weigh_1), before_1N, shares_1U)
        token_B = lax.dynamic_update_slice_in_dim(token_B, jnp.where(kept_1, token_1, next_1), row, 0)
        return jnp.where(kept_1[0], 1, number + 1), token_B, asked_B.at[row].set(~kept_1[0])

    return lax.while_loop(lambda carry: carry[2].any(), judge, (jnp.int32(1), token_B, asked_B))[1]


def judged(logits_BNL: jax.Array, token_B: jax.Array, total_B: jax.Array, weigh: Weigh, rows: RowSampling) -> tuple[jax.Array, jax.Array]:
    """([B] bool, [B, N]): is each row's token one that the filters keep; and the weights of the tokens before it, by blocks.

    The first token is always kept.

    Args:
      total_B: the weights of all tokens that top-k keeps.
    """
    logit_B = _logit_of(logits_BNL, token_B)
    before_BN = lax.cond(
        # Always. Without a branch XLA:CPU looks the token's logit up for each one that it is compared with, and writes all weights down.
        jnp.any(total_B > 0),
        lambda: block_sums(logits_BNL, _weigh_before(logit_B, token_B, weigh)),
        lambda: jnp.zeros(logits_BNL.shape[:2]),
    )
    in_k_B = lax.cond(
        jnp.any(rows.top_k_B < logits_BNL[0].size),
        lambda: _count(_before(logits_BNL, ids_in_blocks(logits_BNL), logit_B, token_B)) < rows.top_k_B,
        lambda: jnp.ones(len(token_B), bool),
    )
    mass_B = before_BN.sum(axis=-1)
    in_p_B = (mass_B == 0) | (mass_B < rows.top_p_B * total_B)
    return in_k_B & in_p_B & (weigh(logit_B) >= rows.min_p_B), before_BN


def surely_kept(
    logits_BNL: jax.Array, highest_BN: jax.Array, token_B: jax.Array, sums_BN: jax.Array, weigh: Weigh, rows: RowSampling
) -> jax.Array:
    """[B] bool: would the filters keep each row's token even if all blocks came before it that have one as likely? Not with top-k."""
    logit_B = _logit_of(logits_BNL, token_B)
    at_most_B = jnp.where(highest_BN >= logit_B[:, None], sums_BN, 0).sum(axis=-1)
    in_p_B = at_most_B < rows.top_p_B * sums_BN.sum(axis=-1)
    return (jnp.asarray(rows.top_k_B) >= logits_BNL[0].size) & in_p_B & (weigh(logit_B) >= rows.min_p_B)


def _before_top_p(logits_BNL, sums_BN, asked_B, weigh, rows):
    """[B]: the weights of all tokens, or of as many as top-k keeps where top-p is asked for too."""
    both_B = asked_B & (jnp.asarray(rows.top_k_B) < logits_BNL[0].size) & jnp.isfinite(rows.top_p_B)
    all_B = sums_BN.sum(axis=-1)
    return jnp.where(both_B, lax.cond(both_B.any(), lambda: _of_first(logits_BNL, both_B, rows.top_k_B, weigh), lambda: all_B), all_B)


def _of_first(logits_BNL, asked_B, count_B, weigh):
    """[B]: the weights of the first tokens together, found by a bisection over the bits of a logit between them and the others."""

    def narrower(between):
        low_B, high_B = between
        middle_B = (low_B >> 1) + (high_B >> 1) + (low_B & high_B & 1)  # a sum of both may have 33 bits
        reach_B = _count(logits_BNL >= per_row(_float_at(middle_B), logits_BNL))
        low_B = jnp.where(reach_B >= count_B, middle_B, low_B)
        return low_B, jnp.where(reach_B == count_B, low_B + 1, jnp.where(reach_B > count_B, high_B, middle_B))

    largest_B = jnp.full(len(count_B), jnp.finfo(jnp.float32).max)
    low_B = _place_of(-largest_B)
    high_B = jnp.where(asked_B, _place_of(largest_B), low_B) + 1
    # A row that has found its bound stays there; where fewer tokens than `count_B` may come its `high_B` even falls to `low_B`.
    low_B, _ = lax.while_loop(lambda between: jnp.any(between[1] > between[0] + 1), narrower, (low_B, high_B))
    last_B = _float_at(low_B)
    above = logits_BNL > per_row(last_B, logits_BNL)
    of_above_B = block_sums(jnp.where(above, logits_BNL, -jnp.inf), lambda logits, _: weigh(logits)).sum(axis=-1)
    return of_above_B + (count_B - _count(above)).astype(jnp.float32) * weigh(last_B[:, None])[:, 0]


def _count(of_BNL):
    """[B] int32: how many are true."""
    return of_BNL.sum(axis=(1, 2), dtype=jnp.int32)


def _before(x, ids, logit_B, token_B):
    """bool, of logits x [B, ...] of the tokens `ids` [B or 1, ...]: do they come before each row's token?"""
    logit = per_row(logit_B, x)
    return (x > logit) | ((x == logit) & (ids < per_row(token_B, x)))


def _weigh_before(logit_B, token_B, weigh):
    """The weights of the tokens that come before each row's token; 0 for the others."""
    return lambda x, ids: weigh(jnp.where(_before(x, ids, logit_B, token_B), x, -jnp.inf))


def _logit_of(logits_BNL, token_B):
    L = logits_BNL.shape[2]
    return jnp.take_along_axis(block_of(logits_BNL, token_B // L), (token_B % L)[:, None], axis=1)[:, 0]


def _place_of(x_B):
    """int32 that are in order as these float32 are."""
    bits = lax.bitcast_convert_type(x_B, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float_at(place_B):
    return lax.bitcast_convert_type(place_B ^ ((place_B >> 31) & 0x7FFFFFFF), jnp.float32)
