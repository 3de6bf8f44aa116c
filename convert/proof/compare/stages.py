"""What both sides of `compare` are given, and what they give: a prompt, and the states of its tokens stage by stage.

Shape suffixes: T tokens (in the vision stage image features), N tiles, C colours, S pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maverick_jax.config import Config

TILES, WORDS = 2, 48
LONG_CHUNK = 1024  # tokens; a prompt goes beyond chunks that are shorter
LOGITS_AT_ONCE = 4096  # of the vocabulary


class Prompt(NamedTuple):
    """Attributes: ids [1, T] int32, tiles [N, C, S, S] float32 or None."""

    ids: np.ndarray
    tiles: np.ndarray | None


def make_prompt(config: Config) -> Prompt:
    """Ordinary tokens, around the tiles of a picture if the model sees; the same every time. Longer than a chunk that is short."""
    generator, text, vision = np.random.default_rng(0), config.text, config.vision
    chunk = text.attention_chunk_size or 0
    count = WORDS + (chunk if chunk <= LONG_CHUNK else 0)
    special = {*config.eos_token_id, config.bos_token_id, config.pad_token_id, config.image_token_index}
    end = min((i for i in special if text.vocab_size // 2 < i < text.vocab_size), default=text.vocab_size)
    words = generator.choice(np.setdiff1d(np.arange(end), list(special)), count + TILES).tolist()
    if vision is None:
        return Prompt(np.array([words], np.int32), None)
    block = [id for tile in range(TILES) for id in (words.pop(), *[config.image_token_index] * vision.tokens_per_tile)]
    ids = [*words[: count // 2], *block, *words[count // 2 :]]
    tiles = generator.uniform(-1, 1, (TILES, vision.num_channels, vision.image_size, vision.image_size)).astype(np.float32)
    return Prompt(np.array([ids], np.int32), tiles)


class State(NamedTuple):
    """What one side holds after a stage.

    Attributes:
      stage: "vision", "embedding", "layer 0" and so on, "logits".
      values: [T, width] float32.
      expert_T: the expert that a layer sent each token to; None where there are none.
    """

    stage: str
    values: np.ndarray
    expert_T: np.ndarray | None = None
