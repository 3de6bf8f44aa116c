"""Top-k, top-p and min-p: draw among the tokens that they keep, and sort no vocabulary for it.

Tokens stand in an order: the most likely first, of equally likely ones the lower ids first. Each filter keeps a beginning of it.
Mostly that lies among a few candidates, which come from the blocks with the highest maxima. Where it does not, tokens are drawn
from all, and whoever draws one that is not kept draws again from those before it: all that are kept are among them, and none of
them has become more likely beside the others.

Shape suffixes: B batch, V vocabulary, N blocks, L neighbouring tokens of a block, C candidates, U numbers by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maverick_jax.inference.sampling.blocks import block_of, draw, draw_at_once, ids_in_blocks, per_row
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


def among_candidates(logits_BNL: jax.Array, highest_BN: jax.Array, weigh: Weigh, rows: RowSampling, shares_BU: jax.Array) -> Candidates:
    """Draw from what the filters keep, if that can be found among the likeliest tokens.

    Args:
      logits_BNL: float32.
      highest_BN: the largest logit of every block.
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
    of_all_B = lax.cond(jnp.all(few), lambda: jnp.zeros(B), lambda: _sum(weigh(logits_BNL)))
    total_B = jnp.where(few, jnp.where(in_k, weight_BC, 0).sum(axis=-1), of_all_B)
    kept = in_k & (jnp.cumsum(weight_BC, axis=-1) - weight_BC < (rows.top_p_B * total_B)[:, None])
    ended = few | ((rows.top_k_B >= N * L) & ~kept[:, -1]) | (count == N * L)
    needed = kept | (in_k & few[:, None])
    certain_B = ended & ((weigh(beyond_B[:, None])[:, 0] == 0) | (~needed | (logit_BC > beyond_B[:, None])).all(axis=-1))
    pick_B1 = draw_at_once(jnp.where(kept, in_min_p(weight_BC, rows), 0), shares_BU)[:, None]
    place_B1 = jnp.take_along_axis(place_BC, pick_B1, axis=1)
    token_B1 = jnp.take_along_axis(block, place_B1 // L, axis=1) * L + place_B1 % L
    return Candidates(token_B1[:, 0].astype(jnp.int32), certain_B)


def among_all(
    logits_BNL: jax.Array,
    token_B: jax.Array,
    asked_B: jax.Array,
    weigh: Weigh,
    rows: RowSampling,
    shares: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """[B] int32: tokens that all filters keep, from tokens drawn with min-p alone.

    On average each draw again halves what is still to be refused. Few rows draw again, so they do it one after the other.

    Args:
      token_B: drawn from all tokens by their weights.
      asked_B: bool, the rows that have top-k or top-p; their logits are finite.
      shares: from the number of the draw, 1 and up, to new numbers by chance [B, U].
    """
    total_B = _before_top_p(logits_BNL, asked_B, weigh, rows)

    def again(carry):
        number, token_B, refused_B = carry
        row = jnp.argmax(refused_B)
        here = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(jnp.asarray(x), row, 1), (logits_BNL, token_B, total_B, weigh, rows))
        logits_1NL, token_1, total_1, weigh_1, rows_1 = here
        logit_1 = _logit_of(logits_1NL, token_1)

        def weigh_before(logits, ids):
            return jnp.where(_before(logits, ids, logit_1, token_1), in_min_p(weigh_1(logits), rows_1), 0)

        token_1 = draw(logits_1NL, weigh_before, lax.dynamic_slice_in_dim(shares(number), row, 1))
        kept = is_kept(logits_1NL, token_1, total_1, weigh_1, rows_1)[0]
        token_B = lax.dynamic_update_slice_in_dim(token_B, token_1, row, 0)
        return jnp.where(kept, 1, number + 1), token_B, refused_B.at[row].set(~kept)

    refused_B = asked_B & ~is_kept(logits_BNL, token_B, total_B, weigh, rows)
    return lax.while_loop(lambda carry: carry[2].any(), again, (jnp.int32(1), token_B, refused_B))[1]


def is_kept(logits_BNL: jax.Array, token_B: jax.Array, total_B: jax.Array, weigh: Weigh, rows: RowSampling) -> jax.Array:
    """[B] bool: is each row's token one that top-k and top-p keep? The first one always is.

    Args:
      total_B: the weights of all tokens that top-k keeps.
    """
    logit_B = _logit_of(logits_BNL, token_B)
    ids = ids_in_blocks(logits_BNL)

    def in_k():
        return _sum(_before(logits_BNL, ids, logit_B, token_B).astype(jnp.float32)) < rows.top_k_B.astype(jnp.float32)

    def in_p():
        mass_B = _sum(jnp.where(_before(logits_BNL, ids, logit_B, token_B), weigh(logits_BNL), 0))
        return (mass_B == 0) | (mass_B < rows.top_p_B * total_B)

    # Two branches also keep XLA from writing down, for both, which tokens come before: that took as long as all the rest.
    all_in = jnp.ones(len(token_B), bool)
    kept_B = lax.cond(jnp.any(rows.top_k_B < logits_BNL[0].size), in_k, lambda: all_in)
    return kept_B & lax.cond(jnp.any(jnp.isfinite(rows.top_p_B)), in_p, lambda: all_in)


def in_min_p(weight: jax.Array, rows: RowSampling) -> jax.Array:
    """The weights [B, ...] that min-p keeps, 0 in the place of the others."""
    return jnp.where(weight >= per_row(rows.min_p_B, weight), weight, 0)


def _before_top_p(logits_BNL, asked_B, weigh, rows):
    """[B]: the weights of all tokens, or of as many as top-k keeps where top-p is asked for too."""
    both_B = asked_B & (jnp.asarray(rows.top_k_B) < logits_BNL[0].size) & jnp.isfinite(rows.top_p_B)
    all_B = _sum(weigh(logits_BNL))
    return jnp.where(both_B, lax.cond(both_B.any(), lambda: _of_first(logits_BNL, rows.top_k_B, weigh), lambda: all_B), all_B)


def _of_first(logits_BNL, count_B, weigh):
    """[B]: the weights of the first tokens together, found by a bisection over the bits of their last one's logit."""

    def as_many(logit_B):
        return _sum((logits_BNL >= logit_B[:, None, None]).astype(jnp.float32)) >= count_B.astype(jnp.float32)

    def narrower(_, between):
        low_B, high_B = between
        middle_B = (low_B >> 1) + (high_B >> 1) + (low_B & high_B & 1)  # a sum of both may have 33 bits
        enough_B = as_many(_float_at(middle_B))
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    largest_B = jnp.full(len(count_B), jnp.finfo(jnp.float32).max)
    low_B, _ = lax.fori_loop(0, 32, narrower, (_place_of(-largest_B), _place_of(largest_B) + 1))
    last_B = _float_at(low_B)
    above = logits_BNL > last_B[:, None, None]
    missing_B = count_B.astype(jnp.float32) - _sum(above.astype(jnp.float32))
    return _sum(jnp.where(above, weigh(logits_BNL), 0)) + missing_B * weigh(last_B[:, None])[:, 0]


def _before(logits, ids, logit_B, token_B):
    """bool, of logits [B, ...] of the tokens `ids` [B or 1, ...]: do they come before each row's token?"""
    logit = per_row(logit_B, logits)
    return (logits > logit) | ((logits == logit) & (ids < per_row(token_B, logits)))


def _logit_of(logits_BNL, token_B):
    L = logits_BNL.shape[2]
    return jnp.take_along_axis(block_of(logits_BNL, token_B // L), (token_B % L)[:, None], axis=1)[:, 0]


def _place_of(x_B):
    """int32 that are in order as these float32 are."""
    bits = lax.bitcast_convert_type(x_B, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float_at(place_B):
    return lax.bitcast_convert_type(place_B ^ ((place_B >> 31) & 0x7FFFFFFF), jnp.float32)


def _sum(x_BNL):
    """[B]. By blocks: one sum over so many would be off in the fifth digit."""
    return x_BNL.sum(axis=-1).sum(axis=-1)
