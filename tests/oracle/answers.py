"""How likely a model's tokens are, made of all its logits."""

import numpy as np

from maverick_jax.model import Llama4
from maverick_jax.training.batch import Batch


def log_softmax(model: Llama4, batch: Batch) -> np.ndarray:
    """[B, T, V] float64."""
    logits = np.asarray(model(batch.ids_BT, batch.tiles_N3SS, lengths=batch.lengths_B), np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def likely(model: Llama4, batch: Batch) -> np.ndarray:
    """[B, T] float64 log-probability of each target."""
    return np.take_along_axis(log_softmax(model, batch), np.asarray(batch.target_BT)[..., None], axis=-1)[..., 0]
