"""The objective of supervised training: the cross-entropy of the tokens that count, and a share for an even load of the experts.

Shape suffixes: B rows, T tokens (of a row, or of all rows once flattened), C tokens of a piece, V vocabulary, E experts, M layers with
experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from maverick_jax.model import Llama4
from maverick_jax.sharding.dispatch import Stats
from maverick_jax.training.batch import Batch, read
from maverick_jax.training.logits import log_probabilities, over_pieces


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Mean of `-log p(target)` over the tokens that count.

    Attributes:
      balance: weight of `unevenness`; 0 leaves the routers alone. Llama 4's own recipe does not say whether it has such a term.
    """

    balance: float = 0.0

    def total(self, batch: Batch) -> jax.Array:
        return jnp.asarray(batch.weight_BT).sum()

    def __call__(self, model: Llama4, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden_BTD, stats = read(model, batch)

        def of_logits(logits_BCV, target_BC):
            return log_probabilities(logits_BCV, target_BC), logits_BCV.argmax(axis=-1) == target_BC

        logprob_BT, right_BT = over_pieces(model, hidden_BTD, of_logits, batch.target_BT)
        lost = -(batch.weight_BT * logprob_BT).sum()
        measures = {"cross_entropy": lost, "accuracy": jnp.where(right_BT, batch.weight_BT, 0).sum(), **of_mixtures(stats)}
        if self.balance and stats:
            lost += self.balance * unevenness(stats) * self.total(batch)
        return lost, measures


def unevenness(stats: Sequence[Stats]) -> jax.Array:
    """[] float32, 1 where every expert of every mixture has as many tokens as any other, more elsewhere.

    E times the sum over experts of their share of the tokens and the mean probability that the router gives them (a softmax of its
    scores), the mean of all mixtures. Source: Fedus et al. 2021, "Switch Transformers", equation 4, https://arxiv.org/abs/2101.03961.
    """

    def of_layer(stats: Stats) -> jax.Array:
        probability_E, _, tokens = _probabilities(stats)
        return len(probability_E) * (stats.load_E.astype(jnp.float32) / tokens * probability_E).sum()

    return jnp.stack([of_layer(layer) for layer in stats]).mean()


def of_mixtures(stats: Sequence[Stats]) -> dict[str, jax.Array]:
    """Sums over a batch: tokens per expert [M, E], dropped tokens, and the routers' entropy in nats times tokens [M]."""
    if not stats:
        return {}
    entropy_M = jnp.stack([entropy * tokens for _, entropy, tokens in map(_probabilities, stats)])
    return {
        "load": jnp.stack([layer.load_E for layer in stats]),
        "dropped": jnp.stack([layer.dropped for layer in stats]).sum(),
        "router_entropy": jax.lax.stop_gradient(entropy_M),
    }


def _probabilities(stats: Stats) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[E] mean of the softmax of a router's scores, [] its mean entropy, and [] the tokens that were routed."""
    assert stats.scores_TE is not None
    assert stats.expert_T is not None
    E = stats.scores_TE.shape[1]
    real_T1 = (stats.expert_T < E)[:, None]
    log_TE = jax.nn.log_softmax(stats.scores_TE, axis=-1)
    tokens = jnp.maximum(real_T1.sum(), 1).astype(jnp.float32)
    entropy = -jnp.where(real_T1, jnp.exp(log_TE) * log_TE, 0).sum() / tokens
    return jnp.where(real_T1, jnp.exp(log_TE), 0).sum(axis=0) / tokens, entropy, tokens
