"""Our models as the tests call them: jitted, with inputs of ordinary tokens, and how close to the truth they must be."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maverick_jax.inference.cache import KVCache
from maverick_jax.model import Llama4

# Both compute in float32 but sum in another order: measured differences are about 1e-5 on logits of about 5, while the
# smallest real fault (a missing temperature) moves them by 2.5. Never relaxed.
TOLERANCE = 1e-4

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
