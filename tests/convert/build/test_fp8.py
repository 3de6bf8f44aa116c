"""The official FP8 checkpoint of Hugging Face: kept bit for bit, given back bit for bit, multiplied out exactly."""

import copy
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from maverick_jax.checkpoint import load
from maverick_jax.convert import convert, export, open_model_directory, open_source
from maverick_jax.sharding import make_mesh
from oracle import tiny_checkpoints
from oracle.forward import TOLERANCE, logits
from oracle.pair import picture_prompt

EXPERTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


class FP8(NamedTuple):
    """A checkpoint, our conversion of it, and what the checkpoint holds, read by the library."""

    model: torch.nn.Module
    source: Path
    converted: Path
    tensors: dict[str, torch.Tensor]


SHARDS = {"maverick": 500_000, "text_only": 500_000, "scout": None}  # bytes; None: a single file


@pytest.fixture(scope="module")
def fp8_cases(cases, module_path) -> dict[str, FP8]:
    made = {}
    for variant, size in SHARDS.items():
        model, source, converted = cases[variant].model, module_path / variant, module_path / f"{variant}-converted"
        tiny_checkpoints.save_fp8_checkpoint(model, source, shard_bytes=size)
        convert(source, converted, progress=False)
        made[variant] = FP8(model, source, converted, load_files(source))
    return made


@pytest.fixture(params=list(SHARDS))
def fp8(request, fp8_cases) -> FP8:
    return fp8_cases[request.param]


@pytest.fixture
def source(fp8_cases, tmp_path) -> Path:
    """A checkpoint to damage, in one file."""
    return shutil.copytree(fp8_cases["scout"].source, tmp_path / "source")


def load_files(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def data(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def multiplied_out(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """[out, in], the product of values and scales rounded to bfloat16: what compressed-tensors computes with."""
    return (tensors[name].float() * tensors[f"{name}_scale"].float()).to(torch.bfloat16)


def experts_of(fp8: FP8):
    """Our name of each expert stack, and the names of its matrices."""
    text = getattr(fp8.model.config, "text_config", fp8.model.config)
    prefix = "language_model." if hasattr(fp8.model.config, "text_config") else ""
    for layer in range(text.num_hidden_layers):
        for ours, theirs in EXPERTS.items():
            stored = [f"{prefix}model.layers.{layer}.feed_forward.experts.{e}.{theirs}.weight" for e in range(text.num_local_experts)]
            if stored[0] in fp8.tensors:
                yield f"text.layers.{layer}.feed_forward.experts.{ours}", stored


def test_values_and_scales_are_those_of_the_file(fp8):
    """One byte per weight, no rounding: E x [out, in] and E x [out, 1] become [E, in, out] and [E, 1, out]."""
    model = open_model_directory(fp8.converted)
    for ours, stored in experts_of(fp8):
        values, scales = model.read(f"{ours}.values", ...), model.read(f"{ours}.scales", ...)
        assert (values.dtype, scales.dtype) == ("float8_e4m3fn", "bfloat16")
        assert values.tobytes() == b"".join(data(fp8.tensors[name].T) for name in stored), ours
        assert scales.tobytes() == b"".join(data(fp8.tensors[f"{name}_scale"].T) for name in stored), ours
        assert values.shape == (len(stored), *fp8.tensors[stored[0]].T.shape)
        assert scales.shape == (len(stored), 1, values.shape[2])


def test_everything_but_the_experts_is_as_in_the_bfloat16_checkpoint(fp8_cases, cases):
    """Only the routed experts are quantized; the reader of FP8 must not touch the rest."""
    for variant, fp8 in fp8_cases.items():
        ours, plain = open_model_directory(fp8.converted), open_model_directory(cases[variant].converted)
        others = [name for name in plain.parameters if ".experts." not in name]
        assert [name for name in ours.parameters if ".experts." not in name] == others
        for name in others:
            assert ours.read(name, ...).tobytes() == plain.read(name, ...).tobytes(), name


def test_a_round_trip_changes_no_byte(fp8, tmp_path):
    """Tensors, their dtypes, and config.json with its quantization_config."""
    export(fp8.converted, tmp_path / "exported", progress=False)
    exported = load_files(tmp_path / "exported")
    assert exported.keys() == fp8.tensors.keys()
    for name, tensor in fp8.tensors.items():
        assert exported[name].dtype == tensor.dtype
        assert exported[name].shape == tensor.shape
        assert data(exported[name]) == data(tensor), name
    assert (tmp_path / "exported/config.json").read_bytes() == (fp8.source / "config.json").read_bytes()


def test_export_to_bfloat16_multiplies_out(fp8, tmp_path):
    """transformers' own loader then finds a plain checkpoint whose experts are the rounded products."""
    export(fp8.converted, tmp_path / "exported", target="bfloat16", progress=False)
    exported = load_files(tmp_path / "exported")
    assert exported.keys() == fp8.model.state_dict().keys()
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    stacks = {ours: torch.stack([multiplied_out(fp8.tensors, name).T for name in stored]) for ours, stored in experts_of(fp8)}
    prefix = "language_model." if hasattr(fp8.model.config, "text_config") else ""
    for layer in {ours.split(".")[2] for ours in stacks}:
        gate, up, down = (stacks[f"text.layers.{layer}.feed_forward.experts.{part}"] for part in EXPERTS)
        experts = f"{prefix}model.layers.{layer}.feed_forward.experts."
        assert torch.equal(exported[f"{experts}gate_up_proj"], torch.cat([gate, up], -1))
        assert torch.equal(exported[f"{experts}down_proj"], down)
    assert "quantization_config" not in json.loads((tmp_path / "exported/config.json").read_text())


def test_transformers_loads_the_exported_products_and_they_are_near_the_original(fp8_cases, tmp_path):
    """An oracle from outside for the direction of scales: on the wrong axis they are no longer near the weights that were quantized."""
    from transformers import Llama4ForConditionalGeneration

    fp8 = fp8_cases["maverick"]
    export(fp8.converted, tmp_path / "exported", target="bfloat16", progress=False)
    model, report = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "exported", dtype=torch.float32, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        original = fp8.model.state_dict()[name]
        if ".experts." not in name:
            assert torch.equal(tensor, original), name
            continue
        # FP8 keeps 3 bits of mantissa down to 2^-6, then steps of 2^-9; bfloat16 rounds scales and products once more.
        bound = (original.abs() * 2**-4).maximum(original.abs().amax(1, keepdim=True) / 448 * 2**-10) * 1.02 + original.abs() * 2**-7
        assert ((tensor - original).abs() <= bound).all(), name


@pytest.mark.parametrize("variant", ["maverick", "scout"])
def test_logits_are_those_of_the_multiplied_out_weights(fp8_cases, variant):
    """transformers computes with the products that compressed-tensors gives; we with values and scales, from either directory, on one
    device and with the experts over four."""
    fp8 = fp8_cases[variant]
    reference = copy.deepcopy(fp8.model)
    for name, stack in reference.state_dict().items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
            prefix = name.rpartition(".")[0]
            for e, expert in enumerate(stack):
                expert.copy_(torch.cat([multiplied_out(fp8.tensors, f"{prefix}.{e}.{part}.weight").T for part in parts], -1))
    ids, tiles = picture_prompt()
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(ids, dtype=torch.long), pixel_values=torch.tensor(tiles), use_cache=False).logits
    mesh = make_mesh(expert=4, data=2)
    for model in (load(fp8.source, dtype="float32"), load(fp8.converted, dtype="float32"), load(fp8.converted, dtype="float32", mesh=mesh)):
        np.testing.assert_allclose(logits(model, ids, tiles), expected.numpy(), atol=TOLERANCE, rtol=0)


def test_conversion_to_bfloat16_multiplies_out(fp8, tmp_path):
    """The same products as on export, and no word of quantization left in config.json."""
    convert(fp8.source, tmp_path / "plain", target="bfloat16", progress=False)
    model = open_model_directory(tmp_path / "plain")
    assert {dtype.name for _, dtype in model.parameters.values()} == {"bfloat16"}
    for ours, stored in experts_of(fp8):
        expected = b"".join(data(multiplied_out(fp8.tensors, name).T) for name in stored)
        assert model.read(ours, ...).tobytes() == expected, ours
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_scales_of_an_8_bit_cache_change_nothing(source):
    """Our cache is not FP8; the weights are what they are without them."""
    parameters, scale = open_source(source).parameters, GATE.partition("feed_forward")[0] + "self_attn.k_scale"
    change_tensors(source, lambda tensors: tensors.update({scale: torch.ones(1)}))
    assert open_source(source).notes == ("passed over, for they change nothing: k_scale (1).",)
    assert open_source(source).parameters == parameters


def test_a_quantization_config_inside_text_config_is_not_overlooked(source, tmp_path, refused):
    """No release has it there; taken for noise, FP8 weights would be read without a word of how they were made."""
    change_config(source, lambda values: values["text_config"].update(quantization_config=values.pop("quantization_config")))
    with refused("text_config.quantization_config"):
        convert(source, tmp_path / "out", progress=False)


@pytest.mark.parametrize("scratch", [64, 4096])
def test_a_slice_is_that_slice_of_the_whole(fp8_cases, monkeypatch, scratch):
    """Values that lie in 8 tensors, read as a device of a mesh reads its share."""
    monkeypatch.setattr("maverick_jax.convert.formats.tensor_file.SCRATCH", scratch)
    fp8 = fp8_cases["maverick"]
    source = open_source(fp8.source)
    stored = next(names for ours, names in experts_of(fp8) if ours == "text.layers.1.feed_forward.experts.down")
    whole = np.stack([fp8.tensors[name].view(torch.uint8).numpy().T for name in stored])
    random = np.random.default_rng(0)
    for _ in range(12):
        starts = [int(random.integers(0, size)) for size in whole.shape]
        index = tuple(slice(start, int(random.integers(start + 1, size + 1))) for start, size in zip(starts, whole.shape, strict=True))
        found = source.read("text.layers.1.feed_forward.experts.down.values", index)
        np.testing.assert_array_equal(found.view(np.uint8), whole[index], err_msg=str(index))


GATE = "language_model.model.layers.1.feed_forward.experts.3.gate_proj.weight"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"


def change_tensors(source: Path, change) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def change_config(source: Path, change) -> None:
    values = json.loads((source / "config.json").read_text())
    change(values)
    (source / "config.json").write_text(json.dumps(values))


def weights_of(values: dict) -> dict:
    return values["quantization_config"]["config_groups"]["group_0"]["weights"]


DAMAGED = {
    "no scale": (
        lambda s: change_tensors(s, lambda tensors: tensors.pop(f"{GATE}_scale")),
        f"source has FP8 values {GATE} but no {GATE}_scale: fetch the checkpoint again.",
    ),
    "no values": (lambda s: change_tensors(s, lambda tensors: tensors.pop(GATE)), f"source lacks {GATE}"),
    "no config": (
        lambda s: change_config(s, lambda values: values.pop("quantization_config")),
        "model.safetensors: ... is FP8, but config.json has no quantization_config: use the bfloat16 checkpoint",
    ),
    "attention too": (
        lambda s: change_tensors(s, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(torch.float8_e4m3fn)})),
        f"model.safetensors: {QUERY} is FP8; of Hugging Face checkpoints only the routed experts may be: use the bfloat16",
    ),
    "a scale of another shape": (
        lambda s: change_tensors(s, lambda tensors: tensors.update({f"{GATE}_scale": torch.ones(1, 160).bfloat16()})),
        f"model.safetensors: {GATE}_scale has shape [1, 160], the model's config asks for [96, 1].",
    ),
    "one scale in float32": (
        lambda s: change_tensors(s, lambda tensors: tensors.update({f"{GATE}_scale": tensors[f"{GATE}_scale"].float()})),
        f"model.safetensors: {GATE}_scale is float32, other parts of text.layers.1.feed_forward.experts.gate.scales are bfloat16",
    ),
    "one expert in bfloat16": (
        lambda s: change_tensors(s, lambda tensors: tensors.update({GATE: tensors[GATE].to(torch.bfloat16)})),
        f"model.safetensors: {GATE} is bfloat16 and has {GATE}_scale beside it, as FP8 values have: use the bfloat16 checkpoint",
    ),
    "fixed scales of the inputs": (
        lambda s: change_tensors(s, lambda tensors: tensors.update({GATE.replace(".weight", ".input_scale"): torch.ones(1)})),
        f"model.safetensors: {GATE} is FP8 with a fixed scale of its inputs, ....input_scale, which is not supported: use the bfloat16",
    ),
    "scales per tensor": (
        lambda s: change_config(s, lambda values: weights_of(values).update(strategy="tensor")),
        "config.json: compressed-tensors with strategy 'tensor' is not supported: use the bfloat16 checkpoint or the official FP8 one.",
    ),
    "scales per block": (
        lambda s: change_config(s, lambda values: weights_of(values).update(strategy="block")),
        "config.json: compressed-tensors with strategy 'block' is not supported",
    ),
    "zero points": (
        lambda s: change_config(s, lambda values: weights_of(values).update(symmetric=False)),
        "config.json: compressed-tensors with symmetric False is not supported",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_not_the_official_layout_is_refused_by_name(source, tmp_path, damage, refused):
    """Guessed scales give weights that look like weights."""
    change, message = DAMAGED[damage]
    change(source)
    with refused(message):
        convert(source, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_fused_experts_in_fp8_without_scales_are_refused(maverick, tmp_path, refused):
    """Quantized by hand with `tensor.to(float8)`: the config knows nothing of it."""
    source = shutil.copytree(maverick.source, tmp_path / "source")
    name = "language_model.model.layers.1.feed_forward.experts.down_proj"
    file = next(file for file in source.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file, metadata={"format": "pt"})
    with refused(f"{name} is FP8, but config.json has no quantization_config"):
        convert(source, tmp_path / "out", progress=False)


def test_plain_weights_with_scales_beside_them_are_refused(source, tmp_path, refused):
    """With scales left over nobody can say whether the values have been multiplied by them."""
    change_tensors(source, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn}))
    with refused(".weight is bfloat16 and has ....weight_scale beside it, as FP8 values have: use the bfloat16 checkpoint"):
        convert(source, tmp_path / "out", progress=False)
