"""The objective of distillation: the teacher's likeliest tokens as soft targets, the file's own as hard ones.

What the K likeliest tokens leave is one more class, "all others", so that nothing is told of what the teacher did not say.

Sources: soft and hard targets: Hinton et al. 2015, "Distilling the knowledge in a neural network", https://arxiv.org/abs/1503.02531; both
directions, a student's own answers: Agarwal et al. 2023, "On-policy distillation of language models", https://arxiv.org/abs/2306.13649.
Maverick was distilled from a larger teacher with a weight between soft and hard targets that changed in training; Meta has not published
the rule. Ours, `Schedule`, is a straight line.

Shape suffixes: B rows, T tokens, C tokens of a piece, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maverick_jax.config.checks import check, number
from maverick_jax.model import Llama4
from maverick_jax.training.batch import Array, Batch, read
from maverick_jax.training.logits import Top, apart, log_probabilities, over_pieces
from maverick_jax.training.next_token import of_mixtures

LEAST = 1e-30  # where a probability's logarithm ends


class Taught(NamedTuple):
    """Tokens, and what a teacher expects behind each.

    Attributes:
      batch: `target_BT` are the hard targets.
      top: [B, T, K], the teacher's.
      soft_B: float32, weight of the soft targets; hard ones have the rest.
    """

    batch: Batch
    top: Top
    soft_B: Array

    @property
    def ids_BT(self) -> Array:
        return self.batch.ids_BT


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Weight of the soft targets, in a straight line from the first step to the last: the teacher's guesses, then the data's answers."""

    begin: float = 1.0
    end: float = 0.5

    def __post_init__(self) -> None:
        share = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
        check({"soft-begin": self.begin, "soft-end": self.end}, {"soft-begin": share, "soft-end": share})

    def weight(self, step: int, steps: int) -> float:
        """Of a step, counted from 0."""
        return self.begin + (self.end - self.begin) * min(1.0, step / max(1, steps - 1))


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Mean over tokens of the divergence between teacher and student, and of the cross-entropy with the targets.

    Attributes:
      reverse: KL(student, teacher), which keeps to what the teacher finds likely, instead of KL(teacher, student), which covers it: for a
        student's own answers.
    """

    reverse: bool = False

    def total(self, taught: Taught) -> jax.Array:
        return jnp.asarray(taught.batch.weight_BT).sum()

    def __call__(self, model: Llama4, taught: Taught) -> tuple[jax.Array, dict[str, jax.Array]]:
        batch = taught.batch
        hidden_BTD, stats = read(model, batch)

        def of_logits(logits_BCV, target_BC, top: Top):
            return self.divergence(logits_BCV, top), log_probabilities(logits_BCV, target_BC), logits_BCV.argmax(axis=-1) == top.ids[..., 0]

        divergence_BT, logprob_BT, agrees_BT = over_pieces(model, hidden_BTD, of_logits, batch.target_BT, taught.top)
        soft_B1 = jnp.asarray(taught.soft_B)[:, None]
        lost_BT = soft_B1 * divergence_BT - (1 - soft_B1) * logprob_BT
        values = {"divergence": divergence_BT, "cross_entropy": -logprob_BT, "agreement": agrees_BT.astype(jnp.float32)}
        sums = {name: (batch.weight_BT * value_BT).sum() for name, value_BT in values.items()}
        return (batch.weight_BT * lost_BT).sum(), {**sums, **of_mixtures(stats)}

    def divergence(self, logits_BCV: jax.Array, top: Top) -> jax.Array:
        """[B, C] in nats, 0 where both say the same of the K tokens."""
        teacher_BCK = jnp.asarray(top.logprobs, jnp.float32)
        left_BC = jnp.log(jnp.maximum(1 - jnp.exp(teacher_BCK).sum(axis=-1), LEAST))
        teacher_BCL = jnp.concatenate([teacher_BCK, left_BC[..., None]], axis=-1)
        student_BCK, others_BC = apart(logits_BCV, top.ids)
        student_BCL = jnp.concatenate([student_BCK, others_BC[..., None]], axis=-1)
        p_BCL, log_p_BCL, log_q_BCL = (
            (jnp.exp(student_BCL), student_BCL, teacher_BCL) if self.reverse else (jnp.exp(teacher_BCL), teacher_BCL, student_BCL)
        )
        return (p_BCL * (log_p_BCL - log_q_BCL)).sum(axis=-1)
