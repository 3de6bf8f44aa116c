"""A model of transformers and ours with the same weights, and the inputs that tell them apart where ports go wrong."""

from typing import Any, NamedTuple

import numpy as np
import torch

from maverick_jax.config import Config
from maverick_jax.model import Llama4
from oracle.forward import text_ids
from oracle.port import port
from oracle.tiny_checkpoints import image_block, make_config, make_model


class Pair(NamedTuple):
    """transformers' eager float32 model and ours."""

    reference: torch.nn.Module
    model: Llama4

    @property
    def config(self) -> Config:
        return self.model.config

    def expected(self, ids: Any, tiles: np.ndarray | None = None, **options: Any) -> Any:
        """transformers' output for [B, T] ids; their rows have no padding (its padding shifts positions: spec P7, P26)."""
        if tiles is not None:
            options["pixel_values"] = torch.tensor(tiles)
        with torch.no_grad():
            return self.reference(input_ids=torch.tensor(np.asarray(ids), dtype=torch.long), use_cache=False, **options)

    def expected_logits(self, ids: Any, tiles: np.ndarray | None = None) -> np.ndarray:
        return self.expected(ids, tiles).logits.numpy()


def make_pair(variant: str, **options: Any) -> Pair:
    reference = make_model(make_config(variant))
    return Pair(reference, port(reference, **options))


def picture_prompt(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Text around a picture of 2 x 3 tiles with its global tile and one of a single tile: [1, T] ids, [8, 3, 56, 56] tiles."""
    words = iter(text_ids(1, 13, seed)[0].tolist())
    text = [[next(words) for _ in range(n)] for n in (3, 4, 6)]
    ids = [*text[0], *image_block(2, 3, 4), *text[1], *image_block(1, 1, 4), *text[2]]
    tiles = np.random.default_rng(seed + 1).uniform(-1, 1, (8, 3, 56, 56)).astype(np.float32)
    return np.array([ids], np.int32), tiles
