"""From logits to tokens, every row with its own settings."""

from maverick_jax.inference.sampling.choose import NOT_FINITE, NOTHING_LEFT, Sampled, accept, sample
from maverick_jax.inference.sampling.extras import Extras, history_of, record
from maverick_jax.inference.sampling.prompt_scores import Scores, score
from maverick_jax.inference.sampling.rows import MOST_STOPS, RowExtras, RowSampling
from maverick_jax.inference.sampling.settings import MOST_LOGPROBS, Sampling

__all__ = [
    "MOST_LOGPROBS",
    "MOST_STOPS",
    "NOTHING_LEFT",
    "NOT_FINITE",
    "Extras",
    "RowExtras",
    "RowSampling",
    "Sampled",
    "Sampling",
    "Scores",
    "accept",
    "history_of",
    "record",
    "sample",
    "score",
]
