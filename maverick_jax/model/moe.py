"""Mixture of experts: route -> dispatch -> grouped experts -> combine.

Shape suffixes: B batch, T tokens (of a row, or of all rows once flattened), D model width, F expert width, E experts.
Source: Llama 4 reference, `models/llama4/moe.py`; spec section 2.4.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from maverick_jax.config import TextConfig
from maverick_jax.model.feed_forward import FeedForward
from maverick_jax.model.parameter import weight
from maverick_jax.ops.linear import linear_float32
from maverick_jax.ops.swiglu import ExpertWeights
from maverick_jax.sharding.dispatch import Dispatcher, Stats


class Experts(nnx.Module):
    """The weights of the routed experts of one layer."""

    def __init__(self, E: int, D: int, F: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gate = weight(rngs, (E, D, F), ("expert", "expert_embed", "expert_mlp"), dtype, stack=1)
        self.up = weight(rngs, (E, D, F), ("expert", "expert_embed", "expert_mlp"), dtype, stack=1)
        self.down = weight(rngs, (E, F, D), ("expert", "expert_mlp", "expert_embed"), dtype, stack=1)

    @property
    def weights(self) -> ExpertWeights:
        return ExpertWeights(self.gate[...], self.up[...], self.down[...])


class MoE(nnx.Module):
    """One shared expert and one of E routed experts: `shared(x) + expert(sigmoid(score) * x)`."""

    def __init__(self, config: TextConfig, *, dispatcher: Dispatcher, constrain: Any, dtype: DTypeLike, rngs: nnx.Rngs):
        E, D, F = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.router = weight(rngs, (D, E), ("embed", None), dtype)
        self.experts = Experts(E, D, F, dtype=dtype, rngs=rngs)
        self.shared = FeedForward(D, F, dtype=dtype, rngs=rngs)
        self.dispatcher = dispatcher
        self.constrain = constrain

    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array, expert_BT: jax.Array | None = None) -> tuple[jax.Array, Stats]:
        """[B, T, D] -> ([B, T, D], stats); padding (`real_BT` False) is routed to no expert, tokens to those of `expert_BT` if given."""
        x_TD = self.constrain(x_BTD.reshape(-1, x_BTD.shape[-1]), ("tokens", None))
        # XLA:GPU would make one product of the router's and the shared expert's, and join their matrices first, in every step.
        scores_TE = linear_float32(lax.optimization_barrier(x_TD), self.router[...])
        if expert_BT is None:
            score_T, expert_T = route(scores_TE, real_BT.reshape(-1))
        else:
            score_T, expert_T = route_again(scores_TE, real_BT.reshape(-1), expert_BT.reshape(-1))
        # The score scales the expert's *input*; behind the non-linear SwiGLU it would be another function.
        scaled_TD = x_TD * score_T.astype(x_TD.dtype)[:, None]
        number_T, experts = self.experts.weights.numbered(expert_T)
        routed_TD, stats = self.dispatcher(scaled_TD, number_T, experts)
        # Both in float32: where several devices have parts of them, XLA adds the parts before one exchange, instead of two.
        sum_BTD = self.shared.sums(x_BTD) + routed_TD.astype(jnp.float32).reshape(x_BTD.shape)
        return sum_BTD.astype(x_BTD.dtype), stats._replace(expert_T=expert_T, scores_TE=scores_TE)


def route(scores_TE: jax.Array, real_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Top-1 routing: the sigmoid of the highest score (not a softmax) and its expert, the lowest index on ties.

    Args:
      scores_TE: float32.
      real_T: False for padding.

    Returns:
      [T] float32, of padding any, and [T] int32, of padding E.
    """
    highest_T, expert_T = lax.platform_dependent(scores_TE, real_T, cuda=_highest_in_one, default=_highest)
    return jax.nn.sigmoid(highest_T), expert_T


def route_again(scores_TE: jax.Array, real_T: jax.Array, expert_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `route`, to experts that were chosen before: the sigmoid of today's scores of these."""
    score_T = jnp.take_along_axis(scores_TE, expert_T[:, None], axis=1, mode="clip")[:, 0]
    return jax.nn.sigmoid(score_T), jnp.where(real_T, expert_T.astype(jnp.int32), scores_TE.shape[1])


def _highest(scores_TE, real_T):
    expert_T = jnp.argmax(scores_TE, axis=-1).astype(jnp.int32)
    return scores_TE.max(axis=-1), jnp.where(real_T, expert_T, scores_TE.shape[1])


def _highest_in_one(scores_TE, real_T):
    """Padding wins one more column: a choice behind the maximum is one more launch on a GPU. On TPUs this made more exchanges."""
    nowhere_T1 = jnp.where(real_T, -jnp.inf, jnp.inf)[:, None]
    scores_TE = jnp.concatenate([scores_TE, nowhere_T1], axis=1)
    return scores_TE.max(axis=-1), jnp.argmax(scores_TE, axis=-1).astype(jnp.int32)
