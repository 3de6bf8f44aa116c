"""Top-k, top-p and min-p: draw among the tokens that they keep, and sort no vocabulary for it.

Tokens stand in an order: the most likely first, of equally likely ones the lower ids first. Top-k and top-p each keep a
beginning of it. Mostly that lies among a few candidates, which come from the blocks with the highest maxima; where it does not,
a bisection over the bits of the logits finds its end, which is exact too.

Shape suffixes: B batch, V vocabulary, N blocks, L neighbouring tokens of a block, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maverick_jax.inference.sampling.blocks import block_of, draw_at_once, ids_in_blocks, per_row
from maverick_jax.inference.sampling.rows import RowSampling

CANDIDATES = 128
Weigh = Callable[[jax.Array], jax.Array]  # from logits [B, ...] to weights: probabilities but for a factor per row


class Candidates(NamedTuple):
    """What was drawn among the likeliest tokens.

    Attributes:
      token_B: int32.
      certain_B: bool; does `token_B` count? If not, the filters keep more than the candidates, or it cannot be told.
    """

    token_B: jax.Array
    certain_B: jax.Array


class Cut(NamedTuple):
    """Where the tokens that are kept end in their order.

    Attributes:
      lowest_B: float32, the last one's logit.
      last_B: int32, and its id.
    """

    lowest_B: jax.Array
    last_B: jax.Array

    def keeps(self, logits: jax.Array, ids: jax.Array) -> jax.Array:
        """bool, for logits [B, ...] of the tokens `ids`, whose first axis is B or 1."""
        lowest = per_row(self.lowest_B, logits)
        return (logits > lowest) | ((logits == lowest) & (ids <= per_row(self.last_B, logits)))


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
    pick_B1 = draw_at_once(jnp.where(kept & (weight_BC >= rows.min_p_B[:, None]), weight_BC, 0), shares_BU)[:, None]
    place_B1 = jnp.take_along_axis(place_BC, pick_B1, axis=1)
    token_B1 = jnp.take_along_axis(block, place_B1 // L, axis=1) * L + place_B1 % L
    return Candidates(token_B1[:, 0].astype(jnp.int32), certain_B)


def cut_of_all(logits_BNL: jax.Array, weigh: Weigh, rows: RowSampling, asked_B: jax.Array) -> Cut:
    """Where top-k, then top-p end.

    Args:
      asked_B: bool, the rows that need it; top-k and top-p each cost 32 sums over the vocabulary if one of these rows has it.
    """
    vocabulary = logits_BNL[0].size
    ids = ids_in_blocks(logits_BNL)
    every = Cut(jnp.full(len(asked_B), -jnp.finfo(jnp.float32).max), jnp.full(len(asked_B), vocabulary, jnp.int32))

    def in_k():
        return _fewest(logits_BNL, jnp.ones_like, jnp.minimum(rows.top_k_B, vocabulary).astype(jnp.float32), every)

    cut = lax.cond(jnp.any(asked_B & (rows.top_k_B < vocabulary)), in_k, lambda: every)

    def in_p():
        total_B = _sum(jnp.where(cut.keeps(logits_BNL, ids), weigh(logits_BNL), 0))
        return _fewest(logits_BNL, weigh, rows.top_p_B * total_B, cut)

    return lax.cond(jnp.any(asked_B & jnp.isfinite(rows.top_p_B)), in_p, lambda: cut)


def _fewest(logits_BNL, weigh, target_B, cut):
    """Where the fewest tokens end, in their order, whose weights together reach the target; at the latest where `cut` is."""
    ids = ids_in_blocks(logits_BNL)

    def mass(floor_B):
        """[B]: the weights of all tokens with this logit or a larger one."""
        kept = cut.keeps(logits_BNL, ids) & (logits_BNL >= floor_B[:, None, None])
        return _sum(jnp.where(kept, weigh(logits_BNL), 0))

    def narrower(_, between):
        low_B, high_B = between
        middle_B = (low_B >> 1) + (high_B >> 1) + (low_B & high_B & 1)  # a sum of both may have 33 bits
        reached_B = mass(_float_at(middle_B)) >= target_B
        return jnp.where(reached_B, middle_B, low_B), jnp.where(reached_B, high_B, middle_B)

    beyond_B = _place_of(jnp.full(len(target_B), jnp.finfo(jnp.float32).max)) + 1
    low_B, _ = lax.fori_loop(0, 32, narrower, (_place_of(cut.lowest_B), beyond_B))
    lowest_B = _float_at(low_B)
    # Of the tokens with just this logit, as many as are missing.
    tied = cut.keeps(logits_BNL, ids) & (logits_BNL == lowest_B[:, None, None])
    above_B = mass(_float_at(low_B + 1))
    missing_B = jnp.ceil((target_B - above_B) / weigh(lowest_B[:, None])[:, 0])
    return Cut(lowest_B, _id_of_nth(tied, missing_B))


def _id_of_nth(which_BNL, n_B):
    """[B] int32: the id of the n-th token that is marked, of the last one if there are fewer."""
    count_BN = which_BNL.sum(axis=-1, dtype=jnp.int32)
    until_BN = jnp.cumsum(count_BN, axis=-1)
    n_B = jnp.clip(n_B, 1, jnp.maximum(until_BN[:, -1], 1).astype(jnp.float32)).astype(jnp.int32)
    block_B = jnp.argmax(until_BN >= n_B[:, None], axis=-1).astype(jnp.int32)
    before_B = jnp.take_along_axis(until_BN - count_BN, block_B[:, None], axis=1)[:, 0]
    within_BL = jnp.cumsum(block_of(which_BNL, block_B), axis=-1, dtype=jnp.int32)
    return block_B * which_BNL.shape[2] + jnp.argmax(within_BL >= (n_B - before_B)[:, None], axis=-1).astype(jnp.int32)


def _place_of(x_B):
    """int32 that are in order as these float32 are."""
    bits = lax.bitcast_convert_type(x_B, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float_at(place_B):
    return lax.bitcast_convert_type(place_B ^ ((place_B >> 31) & 0x7FFFFFFF), jnp.float32)


def _sum(x_BNL):
    """[B]. By blocks: one sum over so many would be off in the fifth digit."""
    return x_BNL.sum(axis=-1).sum(axis=-1)
