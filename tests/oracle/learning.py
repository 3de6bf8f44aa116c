"""Losses and gradients of transformers' models, and batches to learn from."""

from typing import Any

import numpy as np
import torch
from flax import nnx

from maverick_jax.model import Llama4, parameter_name
from maverick_jax.training.batch import Batch
from oracle.forward import text_ids
from oracle.pair import picture_prompt
from oracle.port import convert


def text_batch(rows: int = 4, length: int = 37, seed: int = 0) -> Batch:
    """Over several attention chunks; a part of the tokens counts, some of them half."""
    ids = text_ids(rows, length, seed)
    weight = np.random.default_rng(seed).choice(np.float32([0, 0.5, 1]), ids.shape)
    weight[:, -1] = 0
    return Batch(ids, np.full(rows, length, np.int32), np.roll(ids, -1, axis=1), weight)


def picture_batch() -> Batch:
    ids, tiles = picture_prompt()
    weight = np.ones(ids.shape, np.float32)
    weight[:, -1] = 0
    return Batch(ids, np.array([ids.shape[1]], np.int32), np.roll(ids, -1, axis=1), weight, tiles_N3SS=tiles)


def torch_loss(reference: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the tokens that count, of rows without padding."""
    pictures = {} if batch.tiles_N3SS is None else {"pixel_values": torch.tensor(batch.tiles_N3SS)}
    logits = reference(input_ids=torch.tensor(batch.ids_BT, dtype=torch.long), use_cache=False, **pictures).logits
    target = torch.tensor(batch.target_BT, dtype=torch.long).reshape(-1)
    lost = torch.nn.functional.cross_entropy(logits.reshape(len(target), -1), target, reduction="none")
    weight = torch.tensor(batch.weight_BT).reshape(-1)
    return (lost * weight).sum() / weight.sum()


def torch_gradients(reference: torch.nn.Module, model: Llama4, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """transformers' loss, and its gradient by the names and in the shapes of our parameters; what has none is 0."""
    reference.zero_grad()
    loss = torch_loss(reference, batch)
    loss.backward()
    return loss.item(), in_our_names(model, {n: p.grad for n, p in reference.named_parameters()}, reference)


def in_our_names(model: Llama4, tensors: dict[str, Any], reference: torch.nn.Module) -> dict[str, np.ndarray]:
    """A tensor per parameter of transformers' -> an array per parameter of ours; None stands for zeros."""
    shapes = {name: p.shape for name, p in reference.named_parameters()}
    arrays = {name: np.zeros(shapes[name], np.float32) if t is None else t.detach().numpy() for name, t in tensors.items()}
    return {
        parameter_name(path): convert(parameter_name(path), leaf.shape, arrays)
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
