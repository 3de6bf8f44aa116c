"""Conversion into other dtypes and quantized forms, against arithmetic of our own."""

import json
import re
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
from orbax.checkpoint import v1 as ocp
from safetensors.torch import load_file, save_file

from maverick_jax.convert import convert, export, open_model_directory, open_source
from maverick_jax.convert.build.orbax import flatten
from oracle import tiny_checkpoints
from oracle.port import convert as expected_parameter

COMPONENTS = {
    "experts": r"text\.layers\.\d+\.feed_forward\.experts\.(gate|up|down)",
    "shared": r"text\.layers\.\d+\.feed_forward\.shared\.(gate|up|down)",
    "dense": r"text\.layers\.\d+\.feed_forward\.(gate|up|down)",
    "attention": r"text\.layers\.\d+\.attention\.(query|key|value|output)",
}
ALL = tuple(COMPONENTS)


def matrices(name: str, weight: np.ndarray) -> np.ndarray:
    """[stack, inputs, outputs] of a weight as we lay it out: what is multiplied with activations is an input."""
    if ".experts." in name:
        return weight
    inputs = 2 if name.endswith("attention.output") else 1
    return weight.reshape(1, int(np.prod(weight.shape[:inputs])), -1)


def group_size(inputs: int) -> int:
    """Largest even divisor of the inputs up to 128."""
    return max(size for size in range(2, 129, 2) if inputs % size == 0)


def quantized(weight_XKN: np.ndarray, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Values as numbers [X, K, N] and scales [X, G, N]."""
    X, K, N = weight_XKN.shape
    if target == "fp8":
        scales = (np.abs(weight_XKN).max(1, keepdims=True) / np.float32(448)).astype(ml_dtypes.bfloat16)
        ratio = np.clip(weight_XKN / scales.astype(np.float32), -448, 448)
        return torch.tensor(ratio).to(torch.float8_e4m3fn).float().numpy(), scales
    if target == "int8":
        scales = np.abs(weight_XKN).max(1, keepdims=True) / np.float32(127)
        return np.round(weight_XKN / scales), scales
    groups = weight_XKN.reshape(X, -1, group_size(K), N)
    first = np.abs(groups).argmax(2)[:, :, None]  # of the largest magnitude; it becomes -8 whatever its sign
    scales = np.take_along_axis(groups, first, 2)[:, :, 0] / np.float32(-8)
    return np.clip(np.round(groups / scales[:, :, None]), -8, 7).reshape(X, K, N), scales


def unpacked(values: np.ndarray) -> np.ndarray:
    """[X, K/2, N] bytes -> [X, K, N]: even inputs in the low halves, odd ones in the high halves, two's complement."""
    out = np.stack([values & 15, values >> 4], 2).reshape(values.shape[0], -1, values.shape[2]).astype(np.int8)
    return np.where(out > 7, out - 16, out)


@pytest.fixture(params=["fp8", "int8", "int4"])
def form(request) -> str:
    return request.param


DTYPES = {"fp8": ("float8_e4m3fn", "bfloat16"), "int8": ("int8", "float32"), "int4": ("uint8", "float32")}


@pytest.mark.parametrize("components", [("experts",), ("shared", "attention"), ALL], ids=",".join)
def test_only_what_was_asked_for_is_quantized(maverick, tmp_path, form, components):
    """A leaf too many is a weight that loses precision unasked; norms, router, embeddings and the vision tower always stay."""
    convert(maverick.source, tmp_path / "out", target=form, quantize=components, progress=False)
    expected = {}
    for name, (shape, dtype) in open_model_directory(maverick.converted).parameters.items():
        if not any(re.fullmatch(COMPONENTS[component], name) for component in components):
            expected[name] = (shape, dtype.name)
            continue
        inputs, outputs = (shape[:-1], shape[-1:]) if ".experts." in name or name.endswith("output") else (shape[:1], shape[1:])
        stack, inputs = (inputs[:1], inputs[1:]) if ".experts." in name else ((), inputs)
        groups = int(np.prod(inputs)) // group_size(int(np.prod(inputs))) if form == "int4" else 1
        packed = (*inputs[:-1], inputs[-1] // 2) if form == "int4" else inputs
        expected[f"{name}.values"] = ((*stack, *packed, *outputs), DTYPES[form][0])
        expected[f"{name}.scales"] = ((*stack, groups, *outputs), DTYPES[form][1])
    found = open_model_directory(tmp_path / "out").parameters
    assert {name: (shape, dtype.name) for name, (shape, dtype) in found.items()} == expected


@pytest.mark.parametrize("block", [1 << 12, 1 << 25], ids=["small chunks", "whole"])
def test_values_and_scales_are_those_of_the_formula(maverick, tmp_path, monkeypatch, form, block):
    """The same whatever the chunks: a group of inputs must not be cut by one."""
    monkeypatch.setattr("maverick_jax.convert.formats.places.BLOCK", block)
    convert(maverick.source, tmp_path / "out", target=form, quantize=ALL, progress=False)
    leaves = {name: np.asarray(leaf) for name, leaf in flatten(ocp.load(tmp_path / "out/params")).items()}
    plain = open_model_directory(maverick.converted)
    seen = 0
    for name, (shape, _) in plain.parameters.items():
        weight = expected_parameter(name, shape, maverick.tensors)
        if name in leaves:
            np.testing.assert_array_equal(leaves[name].astype(np.float32), weight, err_msg=name)
            continue
        weight_XKN = matrices(name, weight)
        values, scales = (leaves[f"{name}.{leaf}"] for leaf in ("values", "scales"))
        values = values.reshape(len(weight_XKN), -1, weight_XKN.shape[2])
        values = unpacked(values) if form == "int4" else values.astype(np.float32)
        expected, expected_scales = quantized(weight_XKN, form)
        np.testing.assert_array_equal(scales.reshape(expected_scales.shape), expected_scales, err_msg=name)
        np.testing.assert_array_equal(values, expected, err_msg=name)
        seen += 1
    assert seen == 4 * 4 + 2 * 3 + 2 * 6  # attention, dense, and MoE with what is shared


def test_quantized_values_are_near_the_weights(maverick, tmp_path, form):
    """Whatever the formula says: half a step of the scale, a whole one for the value that would be +8 in four bits."""
    convert(maverick.source, tmp_path / "out", target=form, quantize=ALL, progress=False)
    model, plain = open_model_directory(tmp_path / "out"), open_model_directory(maverick.converted)
    for name in (leaf.removesuffix(".values") for leaf in model.parameters if leaf.endswith(".values")):
        weight_XKN = matrices(name, plain.read(name, ...).astype(np.float32))
        X, K, N = weight_XKN.shape
        values = model.read(f"{name}.values", ...).reshape(X, -1, N)
        values = (unpacked(values) if form == "int4" else values).astype(np.float32)
        scales = model.read(f"{name}.scales", ...).astype(np.float32).reshape(X, -1, N)
        scales = scales.repeat(K // scales.shape[1], 1)
        step = {
            "fp8": np.maximum(np.abs(scales) * 2.0**-9, np.abs(weight_XKN) * 2.0**-3),
            "int8": np.abs(scales),
            "int4": np.abs(scales) * np.where(values == 7, 2, 1),
        }[form]
        assert (np.abs(values * scales - weight_XKN) <= 0.51 * step).all(), name


def test_a_group_of_zeros_stays_zero(maverick, tmp_path, form):
    """Its largest magnitude is no scale: 0 / 0 is not a number."""
    name = "language_model.model.layers.1.feed_forward.experts.down_proj"
    source = one_file(maverick, tmp_path / "source", lambda tensors: tensors[name][3].zero_())
    convert(source, tmp_path / "out", target=form, progress=False)
    model = open_model_directory(tmp_path / "out")
    down = "text.layers.1.feed_forward.experts.down"
    values, scales = (model.read(f"{down}.{leaf}", (slice(3, 4), slice(None), slice(None))) for leaf in ("values", "scales"))
    assert not values.astype(np.float32).any()
    assert np.isfinite(scales.astype(np.float32)).all()


def one_file(case, directory, change, dtype=torch.bfloat16):
    """The case's checkpoint in one file after `change(tensors)`."""
    directory.mkdir()
    tensors = {name: tensor.to(dtype).clone() for name, tensor in case.model.state_dict().items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_bytes((case.source / "config.json").read_bytes())
    return directory


# --- plain dtypes ---


def test_float32_is_exact(maverick, tmp_path):
    """bfloat16 is float32 without its low half: a single bit that differs is an error."""
    summary = convert(maverick.source, tmp_path / "out", target="float32", progress=False)
    assert summary.bytes_written == 2 * summary.bytes_read
    for name, values in flatten(ocp.load(tmp_path / "out/params")).items():
        assert values.dtype == "float32"
        np.testing.assert_array_equal(np.asarray(values), expected_parameter(name, values.shape, maverick.tensors), err_msg=name)
    assert '"bfloat16"' not in (tmp_path / "out/config.json").read_text()


def test_bfloat16_rounds_to_nearest_even(maverick, tmp_path):
    """As torch does; cutting the low half off would bias every weight towards zero."""
    noise = {}

    def disturb(tensors):
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            tensor.mul_(1 + 1e-3 * torch.randn(tensor.shape, generator=generator))
            noise[name] = tensor.to(torch.bfloat16).float().numpy()

    source = one_file(maverick, tmp_path / "source", disturb, torch.float32)
    convert(source, tmp_path / "out", target="bfloat16", progress=False)
    for name, values in flatten(ocp.load(tmp_path / "out/params")).items():
        assert values.dtype == "bfloat16"
        np.testing.assert_array_equal(np.asarray(values, np.float32), expected_parameter(name, values.shape, noise), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_target_every_dtype_is_kept(maverick, tmp_path, dtype):
    """Nothing is cast unasked, whatever the releases have."""
    source = one_file(maverick, tmp_path / "source", lambda tensors: None, getattr(torch, dtype))
    convert(source, tmp_path / "out", progress=False)
    assert {found.name for _, found in open_model_directory(tmp_path / "out").parameters.values()} == {dtype}


def test_the_target_that_is_there_already_changes_nothing(maverick, tmp_path):
    """A cast to the same dtype would be counted, and described, as a change."""
    convert(maverick.source, tmp_path / "out", target="bfloat16", progress=False)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert {entry["transform"] for entry in manifest["tensors"].values()} == {"copy"}
    again, plain = open_model_directory(tmp_path / "out"), open_model_directory(maverick.converted)
    for name in plain.parameters:
        assert again.read(name, ...).tobytes() == plain.read(name, ...).tobytes(), name


# --- from one quantized form to another ---


@pytest.fixture
def fp8_source(maverick, tmp_path):
    return tiny_checkpoints.save_fp8_checkpoint(maverick.model, tmp_path / "fp8")


@pytest.mark.parametrize("target", ["int8", "int4"])
def test_fp8_is_requantized_from_what_it_stands_for(fp8_source, tmp_path, target):
    """The official FP8 checkpoint is the only one of Instruct that fits many disks."""
    convert(fp8_source, tmp_path / "plain", target="bfloat16", progress=False)
    convert(fp8_source, tmp_path / "out", target=target, progress=False)
    model, plain = open_model_directory(tmp_path / "out"), open_model_directory(tmp_path / "plain")
    for name in ("text.layers.1.feed_forward.experts.gate", "text.layers.3.feed_forward.experts.down"):
        values, scales = (model.read(f"{name}.{leaf}", ...) for leaf in ("values", "scales"))
        expected, expected_scales = quantized(plain.read(name, ...).astype(np.float32), target)
        np.testing.assert_array_equal(scales, expected_scales)
        np.testing.assert_array_equal(unpacked(values) if target == "int4" else values.astype(np.float32), expected)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_fp8_to_fp8_is_kept_bit_for_bit(fp8_source, tmp_path):
    """Quantized once more, values would move."""
    convert(fp8_source, tmp_path / "kept", progress=False)
    convert(fp8_source, tmp_path / "again", target="fp8", progress=False)
    kept, again = open_model_directory(tmp_path / "kept"), open_model_directory(tmp_path / "again")
    assert kept.parameters == again.parameters
    for name in kept.parameters:
        assert kept.read(name, ...).tobytes() == again.read(name, ...).tobytes(), name


def test_our_fp8_is_exported_in_the_official_layout(maverick, tmp_path):
    """Other engines can use it, and it converts back to the same bits."""
    convert(maverick.source, tmp_path / "out", target="fp8", progress=False)
    export(tmp_path / "out", tmp_path / "exported", progress=False)
    assert load_file(tmp_path / "exported/model.safetensors").keys() == tiny_checkpoints.fp8_tensors(maverick.model).keys()
    again = open_source(tmp_path / "exported")
    model = open_model_directory(tmp_path / "out")
    assert again.kind == "Hugging Face FP8"
    for name, (shape, _) in again.parameters.items():
        assert again.read(name, (slice(None),) * len(shape)).tobytes() == model.read(name, ...).tobytes(), name


@pytest.mark.parametrize("target,components", [("int8", ("experts",)), ("int4", ("experts",)), ("fp8", ("attention",))])
def test_what_has_no_hugging_face_layout_is_not_exported(maverick, tmp_path, target, components, refused):
    """Written under names of our own, no other engine could read it; multiplied out it can."""
    convert(maverick.source, tmp_path / "out", target=target, quantize=components, progress=False)
    with refused(" has no quantized Hugging Face layout: export with --format bfloat16, which multiplies it out."):
        export(tmp_path / "out", tmp_path / "exported", progress=False)
    export(tmp_path / "out", tmp_path / "exported", target="bfloat16", progress=False)
    assert load_file(tmp_path / "exported/model.safetensors").keys() == maverick.tensors.keys()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"target": "int3"}, "format 'int3' is unknown: choose one of bfloat16, float32, fp8, int8, int4."),
        (
            {"target": "int8", "quantize": ("experts", "router")},
            "'router' cannot be quantized: choose among experts, shared, dense, attention.",
        ),
    ],
)
def test_an_unknown_wish_is_refused(maverick, tmp_path, options, message, refused):
    """A misspelled component would be left in bfloat16 without a word."""
    with refused(message):
        convert(maverick.source, tmp_path / "out", **options, progress=False)
    assert not list(tmp_path.glob("out*"))


# --- values that are not finite ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_that_are_not_finite_are_named(maverick, tmp_path, dtype, value):
    """One among a million: the model would answer with NaN, and nobody would know since when."""
    down, norm = "language_model.model.layers.1.feed_forward.experts.down_proj", "language_model.model.norm.weight"

    def spoil(tensors):
        tensors[down][5, 95, 159] = value
        tensors[norm][0] = value

    source = one_file(maverick, tmp_path / "source", spoil, getattr(torch, dtype))
    summary = convert(source, tmp_path / "out", progress=False)
    assert summary.not_finite == ["text.layers.1.feed_forward.experts.down", "text.norm"]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["not_finite"] == summary.not_finite


@pytest.mark.parametrize("leaf,pattern", [("weight", 0x7F), ("weight", 0xFF), ("weight_scale", 0x7FC0), ("weight_scale", 0xFF80)])
def test_fp8_weights_that_are_not_finite_are_named(fp8_source, tmp_path, leaf, pattern):
    """E4M3FN has no infinities and two NaNs; a scale may be either."""
    name = f"language_model.model.layers.1.feed_forward.experts.5.up_proj.{leaf}"
    file = next(file for file in fp8_source.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    bits = tensors[name].view(torch.uint8 if leaf == "weight" else torch.int16)
    bits[-1, -1] = pattern - (1 << 16 if pattern > 0x7FFF else 0)
    save_file(tensors, file, metadata={"format": "pt"})
    assert convert(fp8_source, tmp_path / "out", progress=False).not_finite == ["text.layers.1.feed_forward.experts.up"]


def test_the_largest_numbers_are_finite(maverick, tmp_path):
    """The patterns next to infinity."""
    largest = torch.finfo(torch.bfloat16).max
    source = one_file(maverick, tmp_path / "source", lambda tensors: tensors["language_model.model.norm.weight"].fill_(-largest))
    assert convert(source, tmp_path / "out", progress=False).not_finite == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_quantizing_what_is_not_finite_names_it_too(maverick, tmp_path, form, value):
    """In a line of the summary, not in warnings of NumPy, which Python shows once and out of context."""
    name = "language_model.model.layers.1.feed_forward.experts.down_proj"

    def spoil(tensors):
        tensors[name][5, 95, 159] = value

    source = one_file(maverick, tmp_path / "source", spoil)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = convert(source, tmp_path / "out", target=form, progress=False)
    assert summary.not_finite == ["text.layers.1.feed_forward.experts.down"]


def test_a_cast_that_overflows_is_named(maverick, tmp_path):
    """The largest float32 rounds to infinity in bfloat16."""

    def spoil(tensors):
        tensors["language_model.model.norm.weight"][0] = torch.finfo(torch.float32).max

    source = one_file(maverick, tmp_path / "source", spoil, torch.float32)
    assert convert(source, tmp_path / "out", target="bfloat16", progress=False).not_finite == ["text.norm"]
