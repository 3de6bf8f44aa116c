"""The objective of reinforcement: answers that were worth more than their group's mean become likelier, others less likely.

Sources: Schulman et al. 2017, "Proximal policy optimization", equation 7, https://arxiv.org/abs/1707.06347; GRPO: Shao et al. 2024,
"DeepSeekMath", https://arxiv.org/abs/2402.03300; the mean of all tokens, and a border above of its own: Yu et al. 2025, "DAPO", equation 8,
https://arxiv.org/abs/2503.14476. Meta has not said which objective Llama 4's online stage had; this is our choice.

Shape suffixes: B rows, T tokens, C tokens of a piece, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maverick_jax.config.checks import NOT_NEGATIVE, POSITIVE, check, number
from maverick_jax.model import Llama4
from maverick_jax.training.batch import Array, Batch, read
from maverick_jax.training.logits import log_probabilities, over_pieces
from maverick_jax.training.next_token import of_mixtures


class Drawn(NamedTuple):
    """Answers and what they were worth.

    Attributes:
      batch: an answer per row, `weight_BT` is 1 at its tokens; `expert_BTM` holds the sampler's experts.
      advantage_BT: float32.
      sampled_BT: float32, how likely each token was for the sampler.
      reference_BT: float32, how likely it is for the model before training; None: not asked.
    """

    batch: Batch
    advantage_BT: Array
    sampled_BT: Array
    reference_BT: Array | None = None

    @property
    def ids_BT(self) -> Array:
        return self.batch.ids_BT


@dataclasses.dataclass(frozen=True)
class Policy:
    """Mean over the answers' tokens of `-min(ratio * advantage, clip(ratio) * advantage)`; the ratio is to the sampler's probability.

    The ratio has two causes: steps made since the answer was drawn, and a sampler that computes otherwise than the trainer. With the
    sampler's experts (`expert_BTM`) and one step per draw both are none but for rounding; `disagreement` is what is left, in nats.

    Attributes:
      below, above: the ratio counts from 1 - below to 1 + above.
      kl: weight of the distance to the model before training: Schulman's estimator k3, http://joschu.net/blog/kl-approx.html.

    Raises:
      UserError: names the setting, its value, and what it must be.
    """

    below: float = 0.2
    above: float = 0.28
    kl: float = 0.0

    def __post_init__(self) -> None:
        share = number("a number from 0 to below 1", lambda value: 0 <= value < 1)
        check(dataclasses.asdict(self), {"below": share, "above": POSITIVE, "kl": NOT_NEGATIVE})

    def total(self, drawn: Drawn) -> jax.Array:
        return jnp.asarray(drawn.batch.weight_BT).sum()

    def __call__(self, model: Llama4, drawn: Drawn) -> tuple[jax.Array, dict[str, jax.Array]]:
        batch = drawn.batch
        hidden_BTD, stats = read(model, batch)

        def of_logits(logits_BCV, target_BC):
            return log_probabilities(logits_BCV, target_BC), jax.lax.stop_gradient(entropy(logits_BCV))

        logprob_BT, entropy_BT = over_pieces(model, hidden_BTD, of_logits, batch.target_BT)
        difference_BT = jnp.where(batch.weight_BT > 0, logprob_BT - drawn.sampled_BT, 0)
        ratio_BT = jnp.exp(difference_BT)
        clipped_BT = jnp.clip(ratio_BT, 1 - self.below, 1 + self.above)
        lost_BT = -jnp.minimum(ratio_BT * drawn.advantage_BT, clipped_BT * drawn.advantage_BT)
        measures = {
            "disagreement": jnp.abs(difference_BT),
            "clipped": (ratio_BT != clipped_BT).astype(jnp.float32),
            "entropy": entropy_BT,
        }
        if drawn.reference_BT is not None:
            behind_BT = jnp.where(batch.weight_BT > 0, drawn.reference_BT - logprob_BT, 0)
            measures["kl"] = jnp.exp(behind_BT) - behind_BT - 1
            lost_BT += self.kl * measures["kl"]
        sums = {name: (batch.weight_BT * value_BT).sum() for name, value_BT in measures.items()}
        return (batch.weight_BT * lost_BT).sum(), {**jax.lax.stop_gradient(sums), **of_mixtures(stats)}


def entropy(logits_BCV: jax.Array) -> jax.Array:
    """[B, C] in nats."""
    log_BCV = jax.nn.log_softmax(logits_BCV, axis=-1)
    return -(jnp.exp(log_BCV) * log_BCV).sum(axis=-1)
