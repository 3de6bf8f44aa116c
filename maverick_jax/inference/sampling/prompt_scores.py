"""How likely the tokens of a prompt are, block by block: the logits of a whole piece of 8,192 tokens would take gigabytes.

Shape suffixes: B rows, T tokens, t tokens of a block, D model width, V vocabulary, N most likely tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maverick_jax.inference.sampling.extras import likelihoods

BLOCK = 128  # tokens of a row


class Scores(NamedTuple):
    """Log-probabilities of the tokens that come behind each place, as `log_probabilities` has them.

    Attributes:
      own_BT: of the token that does come.
      top_BTN, ids_BTN: of the most likely ones, and which they are.
    """

    own_BT: jax.Array
    top_BTN: jax.Array
    ids_BTN: jax.Array


def score(logits: Callable[[jax.Array], jax.Array], x_BTD: jax.Array, next_BT: jax.Array) -> Scores:
    """
    Args:
      logits: [..., D] normed hidden states -> [..., V].
      next_BT: int32, the token that comes behind each place.
    """
    B, T = next_BT.shape
    t = math.gcd(T, BLOCK)

    def of_block(given: tuple[jax.Array, jax.Array]) -> Scores:
        x_BtD, next_Bt = given
        own, top_N, ids_N = likelihoods(logits(x_BtD).reshape(B * t, -1), next_Bt.reshape(-1))
        return Scores(own.reshape(B, t), top_N.reshape(B, t, -1), ids_N.reshape(B, t, -1))

    def in_blocks(x_BT):
        return jnp.moveaxis(x_BT.reshape(B, T // t, t, *x_BT.shape[2:]), 1, 0)

    def joined(x_Bt):
        return jnp.moveaxis(x_Bt, 0, 1).reshape(B, T, *x_Bt.shape[3:])

    return jax.tree.map(joined, lax.map(of_block, (in_blocks(x_BTD), in_blocks(next_BT))))
