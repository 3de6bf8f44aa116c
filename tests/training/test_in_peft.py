"""Adapters there and back: PEFT answers the same with ours, we with PEFT's, and what was read is written again bit for bit."""

import jax
import numpy as np
import optax
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

from maverick_jax.adapter import load_adapter, save_adapter
from maverick_jax.convert.formats.peft import Matrices, spell
from maverick_jax.model.low_rank import adapters, add_adapters
from maverick_jax.training.next_token import NextToken
from maverick_jax.training.split import Split
from maverick_jax.training.step import begin, compile_update, make_update
from oracle.adapted import RANKS, teach
from oracle.forward import TOLERANCE, logits
from oracle.learning import text_batch, torch_loss
from oracle.pair import picture_prompt
from oracle.port import port
from oracle.tiny_checkpoints import make_config, make_model

peft = pytest.importorskip("peft", reason="compares with PEFT, which is not installed: pip install '.[test,torch,peft]'")

# But for the router: PEFT's wrapper of it cannot return a pair, as transformers' Llama 4 wants.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "fc1", "fc2", "linear_1", "linear"]
RELATIVE = 1e-4  # to the largest gradient of a matrix
PARAMETERS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]


@pytest.fixture
def reference():
    return make_model(make_config("maverick"))


def in_peft(reference, **settings):
    """A PEFT model whose adapter has learned something."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "target_parameters": PARAMETERS} | settings)
    adapted = peft.get_peft_model(reference, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return adapted.eval()


def their_logits(model, ids, tiles):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids, dtype=torch.long), pixel_values=torch.tensor(tiles), use_cache=False).logits.numpy()


@pytest.mark.filterwarnings("ignore")  # of PEFT, of itself and of transformers
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"q_proj": 3}}])
def test_from_peft_and_back(reference, settings, tmp_path):
    """Every product of text and pictures; what is written is what was read."""
    ids, tiles = picture_prompt()
    model = port(reference)
    adapted = in_peft(reference, **settings)
    adapted.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    before = logits(model, ids, tiles)
    assert len(load_adapter(model, tmp_path / "peft")) > 60
    expected = their_logits(adapted, ids, tiles)
    assert np.abs(expected - before).max() > 100 * TOLERANCE
    assert_allclose(logits(model, ids, tiles), expected, atol=TOLERANCE, rtol=0)
    save_adapter(model, tmp_path / "ours")
    one, other = (safetensors(tmp_path / folder) for folder in ("peft", "ours"))
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert_array_equal(other[name], array, err_msg=name)


def safetensors(directory) -> dict[str, np.ndarray]:
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore")
def test_to_peft(reference, tmp_path):
    """Ranks of their own, gate and up of an expert that have learned each for itself."""
    ids, tiles = picture_prompt()
    model = port(reference)
    add_adapters(model, {part: rank for part, rank in RANKS.items() if part != "router"}, scale=1.5)
    teach(model)
    theirs = peft.PeftModel.from_pretrained(reference, save_adapter(model, tmp_path / "ours")).eval()
    assert_allclose(their_logits(theirs, ids, tiles), logits(model, ids, tiles), atol=TOLERANCE, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_gradients(reference, tmp_path):
    """As autograd's through PEFT; of gate and up PEFT learns one matrix A, whose gradient is the sum of ours."""
    model, batch = port(reference), text_batch(2, 20)
    adapted = in_peft(reference)  # which changes the reference
    adapted.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    load_adapter(model, tmp_path / "peft")
    split, keep = Split(model), optax.trace(decay=0.0)
    progress = begin(split, keep)
    update = compile_update(make_update(split, NextToken(), keep), progress)
    progress, measures = update(progress, split.frozen, jax.tree.map(lambda x: x[None], batch))
    found = {name: np.asarray(array) for name, array in progress.moments.trace.items()}
    matrices = {name: Matrices(found[f"{name}.a"], found[f"{name}.b"], adapter.scale) for name, adapter in adapters(model).items()}
    for name in [name for name in matrices if name.endswith("experts.gate")]:
        up = name.removesuffix("gate") + "up"
        both = matrices[name].a + matrices[up].a
        matrices[name], matrices[up] = matrices[name]._replace(a=both), matrices[up]._replace(a=both)
    ours, _ = spell(matrices, model.config, "peft")
    loss = torch_loss(adapted, batch)
    loss.backward()
    assert_allclose(float(measures["loss"]), loss.item(), rtol=RELATIVE)
    expected = {name.replace(".default", ""): p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    assert {name for name in ours if ".language_model." in name} == expected.keys()
    for name, gradient in expected.items():
        assert_allclose(ours[name], gradient, atol=RELATIVE * gradient.abs().max().item(), rtol=0, err_msg=name)
