"""What a step of training must compute.

Source: Chowdhery et al. 2022, "PaLM", appendix B, https://arxiv.org/abs/2204.02311: 2 FLOPs per weight and token forward, twice that
backward, one half of it for the gradient of the weights, which those that are not learned do without; attention by its scores.
"""

from __future__ import annotations

import math

from maverick_jax.config import Config
from maverick_jax.convert.formats.names import weights


def flops_per_token(config: Config, length: int, *, adapters_only: bool = False) -> float:
    """Of text in rows of `length` tokens, recomputation not counted.

    Args:
      adapters_only: the base stays as it is; the adapters' own products are not counted.
    """
    text = config.text
    used = 0.0
    for name, weight in weights(config).items():
        looked_up = name == "text.embedding" and not text.tie_word_embeddings
        if weight.sides is not None and name.startswith("text.") and not looked_up:
            share = 1 / text.num_local_experts if weight.component == "experts" else 1
            used += share * math.prod(weight.shape)
    scores = sum(_seen(text.chunk_of_layer(i), length) for i in range(text.num_hidden_layers)) * text.num_attention_heads * text.head_dim
    passes = 2 if adapters_only else 3
    return 2 * used * passes + 4 * scores * 3


def _seen(chunk: int | None, length: int) -> float:
    """Mean number of keys that a token sees."""
    if chunk is None or chunk >= length:
        return (length + 1) / 2
    return (chunk + 1) / 2
