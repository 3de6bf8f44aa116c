"""Find and draw within a vocabulary by blocks of it: the blocks first, then one of them.

A vocabulary has 202,048 tokens, and XLA:CPU takes 4 ns for each of them in an argmax or a running sum, but 0.1 ns in a maximum.

Shape suffixes: B batch, V vocabulary, N blocks, L neighbouring tokens of a block, X any number of weights, U numbers by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# From `x` and ids [1, N, L], or of one block [B, L] and [B, L], to float32 weights, not negative. They are made for the sums and again
# for what is drawn: keeping those of a whole vocabulary takes longer.
WeightsOf = Callable[[jax.Array, jax.Array], jax.Array]
LENGTH = 64  # tokens of a block, about
SHARES = 4  # numbers by chance that a draw takes at most: one, and one more for each time that the blocks stand in blocks


def in_blocks(x_BV: jax.Array) -> jax.Array:
    """[B, V] -> [B, N, L]. Up to 64 devices that share the vocabulary evenly share the blocks evenly too."""
    batch, vocabulary = x_BV.shape
    rest = vocabulary // math.gcd(vocabulary, 64)
    divisors = [d for d in range(1, min(rest, LENGTH**2) + 1) if rest % d == 0]
    length = min(divisors, key=lambda d: abs(math.log(d / LENGTH)))
    return x_BV.reshape(batch, vocabulary // length, length)


def per_row(x_B: jax.Array | np.ndarray, like: jax.Array) -> jax.Array:
    """[B, 1, ...]: one number per row, beside an array [B, ...]."""
    return jnp.reshape(x_B, (-1, *(1,) * (like.ndim - 1)))


def block_of(x_BNL: jax.Array, block_B: jax.Array) -> jax.Array:
    """[B, L]: one block of every row."""
    return jnp.take_along_axis(x_BNL, block_B[:, None, None], axis=1)[:, 0]


def ids_in_blocks(x_BNL: jax.Array) -> jax.Array:
    """[1, N, L] int32: the token ids that stand there."""
    return jnp.arange(x_BNL[0].size, dtype=jnp.int32).reshape(1, *x_BNL.shape[1:])


def first_highest(x_BNL: jax.Array, highest_BN: jax.Array) -> jax.Array:
    """[B] int32: the token with the largest value, of several the one with the lowest id.

    Args:
      highest_BN: the largest value of every block.
    """
    block_B = jnp.argmax(highest_BN, axis=-1).astype(jnp.int32)
    return block_B * x_BNL.shape[2] + jnp.argmax(block_of(x_BNL, block_B), axis=-1).astype(jnp.int32)


def block_sums(x_BNL: jax.Array, weigh: WeightsOf) -> jax.Array:
    """[B, N] sums of each block's weights."""
    return weigh(x_BNL, ids_in_blocks(x_BNL)).sum(axis=-1)


def draw(x_BNL: jax.Array, weigh: WeightsOf, sums_BN: jax.Array, shares_BU: jax.Array) -> jax.Array:
    """[B] int32: one token of every row, each with a probability proportional to its weight; never one whose weight is 0.

    A number by chance of its own for the block and for the token in it: a single one of 24 bits would give equally likely tokens
    of a large vocabulary probabilities that differ by two in a hundred.

    Args:
      sums_BN: `block_sums`, some above 0 in every row.
      shares_BU: float32 numbers by chance between 0 and 1 (not 1 itself), SHARES of every row.
    """
    L = x_BNL.shape[2]
    block_B = _draw_of(sums_BN, shares_BU[:, 1:])
    ids_BL = block_B[:, None] * L + jnp.arange(L, dtype=jnp.int32)[None, :]
    return block_B * L + draw_at_once(weigh(block_of(x_BNL, block_B), ids_BL), shares_BU)


def _draw_of(weight_BX, shares_BU):
    """[B] int32, as `draw`."""
    if weight_BX.shape[1] <= 2 * LENGTH or (weight_BNL := in_blocks(weight_BX)).shape[2] == 1:
        return draw_at_once(weight_BX, shares_BU)
    return draw(weight_BNL, lambda weight, _: weight, weight_BNL.sum(axis=-1), shares_BU)


def draw_at_once(weight_BX: jax.Array, shares_BU: jax.Array) -> jax.Array:
    """`draw` of few weights, by one running sum and the first of the shares."""
    assert shares_BU.shape[1], "blocks of blocks of blocks of so many tokens need more numbers by chance"
    # Rounded, a running sum may fall: where a weight is 0 it must not count.
    until_BX = jnp.where(weight_BX > 0, jnp.cumsum(weight_BX, axis=-1), 0.0)
    reach_B1 = shares_BU[:, :1] * until_BX.max(axis=-1, keepdims=True)
    return jnp.argmax(until_BX > reach_B1, axis=-1).astype(jnp.int32)
