"""A model of transformers and ours with the same weights, and the inputs that tell them apart where ports go wrong."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from maverick_jax.config import Config
from maverick_jax.inference.cache import KVCache
from maverick_jax.model import Llama4
from oracle.port import port
from oracle.tiny_checkpoints import image_block, make_config, make_model

# Both compute in float32 but sum in another order: measured differences are about 1e-5 on logits of about 5, while the
# smallest real fault (a missing temperature) moves them by 2.5. Never relaxed.
TOLERANCE = 1e-4


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


_forward = jax.jit(lambda model, ids, tiles, lengths: model(ids, tiles, lengths=lengths))


def logits(model: Llama4, ids: Any, tiles: np.ndarray | None = None, lengths: Any = None) -> np.ndarray:
    """Our logits, jitted: one program per shape, as long as the tests run."""
    ids = jnp.asarray(ids, jnp.int32)
    lengths = [ids.shape[1]] * ids.shape[0] if lengths is None else lengths
    return np.asarray(_forward(model, ids, tiles, jnp.asarray(lengths, jnp.int32)))


@jax.jit
def cached_step(model: Llama4, ids: jax.Array, lengths: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """One call of the model that continues a cache."""
    return model(ids, lengths=lengths, cache=cache)


@contextlib.contextmanager
def forms_for_tpu() -> Iterator[None]:
    """Where a platform has a form of its own, that of a TPU runs in `cached_step`, on any machine; else that of a CPU."""

    def choose(*operands, default, tpu=None, cpu=None, **_):
        return (tpu or cpu or default)(*operands)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", choose)
        cached_step.clear_cache()
        yield
    cached_step.clear_cache()


def text_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """[rows, length] ids of ordinary tokens."""
    return np.random.default_rng(seed).integers(10, 900, (rows, length)).astype(np.int32)


def picture_prompt(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Text around a picture of 2 x 3 tiles with its global tile and one of a single tile: [1, T] ids, [8, 3, 56, 56] tiles."""
    words = iter(text_ids(1, 13, seed)[0].tolist())
    text = [[next(words) for _ in range(n)] for n in (3, 4, 6)]
    ids = [*text[0], *image_block(2, 3, 4), *text[1], *image_block(1, 1, 4), *text[2]]
    tiles = np.random.default_rng(seed + 1).uniform(-1, 1, (8, 3, 56, 56)).astype(np.float32)
    return np.array([ids], np.int32), tiles
