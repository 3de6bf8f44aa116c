"""Adapters in files without PEFT: both layouts, meshes, several formats of one base, and what is no adapter of ours."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

from maverick_jax.adapter import load_adapter, save_adapter
from maverick_jax.errors import UserError
from maverick_jax.model.low_rank import adapters, add_adapters
from maverick_jax.sharding import LATENCY, AttendOnMesh, Constrain, make_dispatcher, make_mesh
from oracle.adapted import RANKS, teach
from oracle.forward import TOLERANCE, logits, text_ids
from oracle.plain import VISION, plain_model

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEXT = dict(num_hidden_layers=2, num_key_value_heads=2)
IDS = text_ids(2, 12) % 60


def on_mesh(**text):
    mesh = make_mesh(data=2, expert=2, tensor=2)
    options = {"constrain": Constrain(mesh, LATENCY), "attend": AttendOnMesh(mesh, LATENCY), "dispatcher": make_dispatcher(mesh, LATENCY)}
    return plain_model(options=options, **text)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, np.ndarray, dict[str, np.ndarray]]:
    """Where an adapter of all components is, what its model answers, and what it learned."""
    model = plain_model(**TEXT)
    add_adapters(model, {part: rank for part, rank in RANKS.items() if part != "vision"})
    teach(model)
    learned = {f"{name}.{half}": np.asarray(getattr(w, half)[...]) for name, w in adapters(model).items() for half in "ab"}
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder / "vllm", layout="vllm")
    return save_adapter(model, folder / "peft"), logits(model, IDS), learned


@pytest.mark.parametrize("layout", ["peft", "vllm"])
def test_there_and_back(saved, layout):
    """Which of the layouts a file has is seen by its shapes."""
    directory, expected, learned = saved
    model = plain_model(**TEXT)
    names = load_adapter(model, directory.parent / layout)
    assert_allclose(logits(model, IDS), expected, atol=TOLERANCE, rtol=0)
    found = adapters(model)
    assert [*found] == sorted(names)
    for name in ("text.layers.0.attention.output", "text.layers.1.feed_forward.experts.down"):
        assert_array_equal(found[name].a[...], learned[f"{name}.a"])
        assert_array_equal(found[name].b[...], learned[f"{name}.b"])


def test_what_vllm_wants(saved):
    """A of gate|up by hidden size, interleaved B: https://github.com/vllm-project/vllm, `_stack_moe_lora_weights`."""
    directory, _, learned = saved
    tensors, E, r, experts = load_file(directory.parent / "vllm" / FILE), 4, RANKS["experts"], "text.layers.1.feed_forward.experts"
    begin = "base_model.model.model.layers.1.feed_forward.experts"
    a, b = (tensors[f"{begin}.base_layer.lora_{half}.weight"] for half in "AB")
    assert (a.shape, b.shape) == ((E * 2 * r, 16), (48, 2 * r * E))
    for e in range(E):
        delta_ND = b.reshape(48, 2 * r, E)[:, :, e] @ a.reshape(E, 2 * r, 16)[e]
        up = learned[f"{experts}.up.a"][e] @ learned[f"{experts}.up.b"][e]
        assert_allclose(delta_ND[24:].T, up, atol=1e-6)
    a, b = (tensors[f"{begin}.lora_{half}.weight"] for half in "AB")
    assert (a.shape, b.shape) == ((E * r, 24), (16, r * E))


def test_on_a_mesh(saved, tmp_path):
    """Loaded onto eight devices and saved from them: the same bytes."""
    directory, expected, _ = saved
    model = on_mesh(**TEXT)
    load_adapter(model, directory)
    assert_allclose(logits(model, IDS), expected, atol=TOLERANCE, rtol=0)
    again = save_adapter(model, tmp_path / "again")
    for name, array in load_file(directory / FILE).items():
        if ".experts." not in name:  # gate and up became one adapter of both, which they stay
            assert_array_equal(load_file(again / FILE)[name], array)
    assert json.loads((again / "base.json").read_text()) == json.loads((directory / "base.json").read_text())


def test_a_base_in_another_dtype(saved):
    """The adapter is for the weights, however they are stored."""
    model = plain_model(dtype="bfloat16", **TEXT)
    load_adapter(model, saved[0], dtype="bfloat16")
    assert np.abs(logits(model, IDS) - saved[1]).max() < 0.5


def changed(tmp_path, saved, *, config=None, tensors=None) -> Path:
    """A copy of the saved adapter with other settings, or other tensors."""
    out = tmp_path / "changed"
    out.mkdir()
    (out / CONFIG).write_text(json.dumps(json.loads((saved[0] / CONFIG).read_text()) | (config or {})))
    save_file({name: array for name, array in (load_file(saved[0] / FILE) | (tensors or {})).items() if array is not None}, out / FILE)
    return out


QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DOWN = "base_model.model.model.layers.1.feed_forward.experts.lora_A.weight"


@pytest.mark.parametrize(
    "config, tensors, words",
    [
        ({"peft_type": "IA3"}, None, "is a IA3 adapter of PEFT: only LORA is read"),
        ({"use_dora": True}, None, "is a LoRA with DoRA, which is not read: merge it"),
        ({"modules_to_save": ["lm_head"]}, None, "whole weights beside the adapter"),
        ({"bias": "all"}, None, "learned biases"),
        ({"lora_alpha": "much"}, None, "lora_alpha is 'much', and not a number"),
        (None, {QUERY: None}, "has lora_B of model.layers.0.self_attn.q_proj alone"),
        (None, {QUERY: np.zeros((2, 17), np.float32)}, r"lora_A of model.layers.0.self_attn.q_proj has shape \[2, 17\].* another base"),
        (None, {QUERY.replace("q_proj", "qkv"): np.zeros((2, 16), np.float32)}, "has lora_A of model.layers.0.self_attn.qkv alone"),
        (None, {DOWN: np.zeros((8, 25), np.float32)}, r"fits no stack of 4 experts of 16 x 48 or 24 x 16"),
        (None, {"strange": np.zeros(3, np.float32)}, "has strange, which is no part of a LoRA"),
    ],
)
def test_what_is_not_read(tmp_path, saved, config, tensors, words):
    """One line each, and the model stays without an adapter."""
    model = plain_model(**TEXT)
    with pytest.raises(UserError, match=words):
        load_adapter(model, changed(tmp_path, saved, config=config, tensors=tensors))
    assert not adapters(model)


def test_another_base(saved):
    """With fewer layers, or of the same shape with other weights."""
    fewer = plain_model(num_hidden_layers=1, num_key_value_heads=2, moe_layers=(), nope_layers=())
    with pytest.raises(UserError, match=r"adapts .*layers\.1.*another base"):
        load_adapter(fewer, saved[0])
    other = plain_model(**TEXT)
    other.text.norm.set_value(other.text.norm[...] * 1.5)
    with pytest.raises(UserError, match="was trained on another base"):
        load_adapter(other, saved[0])


def test_no_adapter_there(tmp_path, saved):
    """A model in an adapter's place, a second adapter, nothing to save, a layout that there is not."""
    model = plain_model(**TEXT)
    with pytest.raises(UserError, match=r"it has no adapter_config\.json"):
        load_adapter(model, tmp_path)
    with pytest.raises(UserError, match="has no adapter: there is nothing to save"):
        save_adapter(model, tmp_path / "out")
    load_adapter(model, saved[0])
    with pytest.raises(UserError, match="has an adapter already"):
        load_adapter(model, saved[0])
    with pytest.raises(UserError, match="layout is 'hf': choose one of peft, vllm"):
        save_adapter(model, tmp_path / "out", layout="hf")
    with pytest.raises(UserError, match="exists: choose another destination"):
        save_adapter(model, saved[0])
    assert not [*tmp_path.iterdir()]


def test_pictures_have_adapters_too(tmp_path):
    """A vision tower's names are found again."""
    model = plain_model(vision=VISION, **TEXT)
    names = add_adapters(model, {"vision": 2})
    teach(model)
    again = plain_model(vision=VISION, **TEXT)
    load_adapter(again, save_adapter(model, tmp_path / "out"))
    assert [*adapters(again)] == sorted(names)
