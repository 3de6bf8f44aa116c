"""Loss and gradients are those of transformers and autograd, on one device and on eight."""

import jax
import numpy as np
import optax
import pytest
import torch
from numpy.testing import assert_allclose
from transformers import Llama4TextConfig

from maverick_jax.model import Llama4
from maverick_jax.sharding import TRAINING, AllToAll, make_mesh
from maverick_jax.training.batch import Batch
from maverick_jax.training.next_token import NextToken
from maverick_jax.training.split import Split
from maverick_jax.training.step import begin, compile_update, make_update
from oracle.learning import in_our_names, picture_batch, text_batch, torch_gradients, torch_loss
from oracle.port import port
from oracle.tiny_checkpoints import make_config, make_model, text_values

RELATIVE = 1e-4  # to a parameter's largest gradient. Never relaxed
STEPS, LOSSES, AFTER_STEPS = 20, 1e-4, 1e-3


def one_step(model: Llama4, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients as a step has them."""
    split, keep = Split(model), optax.trace(decay=0.0)  # an optimizer that remembers what it was given
    progress = begin(split, keep)
    update = compile_update(make_update(split, NextToken(), keep), progress)
    progress, measures = update(progress, split.frozen, jax.tree.map(lambda x: x[None], batch))
    return float(measures["loss"]), {name: np.asarray(array) for name, array in progress.moments.trace.items()}


def check(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        largest = np.abs(array).max()
        assert largest > 0 or "vision" in name or name == "projector", name
        assert_allclose(ours[name], array, atol=RELATIVE * max(largest, 1e-6), rtol=0, err_msg=name)


@pytest.mark.parametrize("pictures", [False, True], ids=["text", "pictures"])
@pytest.mark.parametrize("variant", ["maverick", "scout"])
def test_one_device(variant, pictures):
    """Every parameter: routers, norms, routed experts, the vision tower; over several chunks, some tokens counting half."""
    reference, batch = make_model(make_config(variant)), picture_batch() if pictures else text_batch()
    model = port(reference)
    loss, expected = torch_gradients(reference, model, batch)
    ours, found = one_step(model, batch)
    assert abs(ours - loss) < RELATIVE * loss
    check(found, expected)
    assert np.abs(found["text.layers.1.feed_forward.router"]).max() > 0
    assert (np.abs(found["vision.patch_embedding"]).max() > 0) == pictures


def test_eight_devices():
    """By the training layout: parameters over all of them, tokens sent to their experts and back, in two rounds."""
    reference, batch = make_model(make_config("scout")), picture_batch()
    mesh = make_mesh(data=2, expert=2, tensor=2)
    model = port(reference, mesh=mesh, layout=TRAINING, dispatcher=AllToAll(mesh, TRAINING, rounds=2))
    loss, expected = torch_gradients(reference, model, batch)
    ours, found = one_step(model, batch)
    assert abs(ours - loss) < RELATIVE * loss
    check(found, expected)


def test_twenty_steps():
    """AdamW with decay, as PyTorch's: losses all the way, and every parameter at the end."""
    reference = make_model(Llama4TextConfig(**text_values("maverick", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])))
    model = port(reference)
    batches = [text_batch(2, 20, seed) for seed in range(4)]
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    split, ours = Split(model), optax.adamw(1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    progress = begin(split, ours)
    update = compile_update(make_update(split, NextToken(), ours), progress)
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        theirs.zero_grad(set_to_none=False)
        loss = torch_loss(reference, batch)
        loss.backward()
        theirs.step()
        progress, measures = update(progress, split.frozen, jax.tree.map(lambda x: x[None], batch))
        assert abs(float(measures["loss"]) - loss.item()) < LOSSES * loss.item(), step
    expected = in_our_names(model, dict(reference.named_parameters()), reference)
    for name, array in progress.learned.items():
        assert_allclose(array, expected[name], atol=AFTER_STEPS * np.abs(expected[name]).max(), rtol=0, err_msg=name)
