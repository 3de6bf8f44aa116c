"""Checkpoints of other tools: refused by the name of what they are, with what to use instead."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from maverick_jax.convert import convert

INSTEAD = "use the bfloat16 checkpoint or the official FP8 one."


def say(**quantization):
    """A config with this quantization_config."""

    def change(source):
        values = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization}
        (source / "config.json").write_text(json.dumps(values))

    return change


def compressed(form: str, **weights):
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True} | weights}
    return say(quant_method="compressed-tensors", format=form, config_groups={"group_0": group})


def say_beside(source):
    """ModelOpt's own file, and a config that knows nothing of it."""
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (source / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": quantization}))


def replace_weights(*names):
    """The weights are in files of these names instead."""

    def change(source):
        for file in source.glob("model*"):
            file.unlink()
        for name in names:
            (source / name).write_bytes(b"GGUF or PK or whatever it begins with")

    return change


def pack_nibbles(source):
    """NVFP4's bytes of two values under a name of ours, without a word in any config."""
    file = next(file for file in sorted(source.glob("*.safetensors")))
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    save_file(tensors | {name: tensors[name][:, ::2].byte().contiguous()}, file, metadata={"format": "pt"})


FOREIGN = {
    "ModelOpt FP8": (
        say(quant_method="modelopt", quant_algo="FP8"),
        f"config.json: quant_method 'modelopt' (FP8) is not supported: {INSTEAD}",
    ),
    "ModelOpt NVFP4": (say(quant_method="modelopt", quant_algo="NVFP4"), "config.json: quant_method 'modelopt' (NVFP4) is not supported"),
    "ModelOpt's own file": (say_beside, "hf_quant_config.json: quantized by NVIDIA ModelOpt, which is not supported: " + INSTEAD),
    "NVFP4 of compressed-tensors": (
        compressed("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group"),
        "config.json: compressed-tensors with format 'nvfp4-pack-quantized', num_bits 4, strategy 'tensor_group' is not supported",
    ),
    "packed 4-bit values": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group"),
        "config.json: compressed-tensors with format 'pack-quantized', num_bits 4, type 'int', strategy 'group' is not supported",
    ),
    "int8": (
        compressed("int-quantized", type="int"),
        "config.json: compressed-tensors with format 'int-quantized', type 'int' is not supported: " + INSTEAD,
    ),
    "fbgemm": (
        say(quant_method="fbgemm_fp8", activation_scale_ub=1200.0, modules_to_not_convert=[]),
        "config.json: quant_method 'fbgemm_fp8' is not supported: " + INSTEAD,
    ),
    "GPTQ": (say(quant_method="gptq", bits=4, group_size=128), "config.json: quant_method 'gptq' is not supported: " + INSTEAD),
    "AWQ": (say(quant_method="awq", bits=4, group_size=128), "config.json: quant_method 'awq' is not supported: " + INSTEAD),
    "bitsandbytes": (say(quant_method="bitsandbytes", load_in_4bit=True), "config.json: quant_method 'bitsandbytes' is not supported"),
    "a method without a name": (say(bits=4), "config.json: quant_method None is not supported"),
    "packed bytes that no config mentions": (pack_nibbles, " has dtype U8; BF16, F16, F32, F8_E4M3 are supported."),
    "GGUF": (
        replace_weights("Llama-4-Q4_K_M.gguf"),
        "source holds GGUF (llama.cpp) files, which are not read: use the safetensors or .pth checkpoint.",
    ),
    "PyTorch .bin": (replace_weights("pytorch_model.bin"), "source holds PyTorch .bin files, which are not read"),
    "PyTorch .bin in shards": (
        replace_weights("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
        "source holds PyTorch .bin files, which are not read",
    ),
    "Flax": (replace_weights("flax_model.msgpack"), "source holds Flax msgpack files, which are not read"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_tools_checkpoint_is_refused_by_name(maverick, tmp_path, kind, refused):
    """Read as bfloat16, its bytes would be weights that look like weights; unnamed, its owner would not know what to fetch."""
    change, message = FOREIGN[kind]
    source = shutil.copytree(maverick.source, tmp_path / "source")
    change(source)
    with refused(message):
        convert(source, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name,kind", [("llama.gguf", "a GGUF (llama.cpp) file, which is not read"), ("model.safetensors", "a file")])
def test_a_file_in_the_place_of_a_directory_is_named(tmp_path, name, kind, refused):
    """Users of llama.cpp give the one file that they have."""
    (tmp_path / name).write_bytes(b"GGUF")
    with refused(f"{name} is {kind}: give the directory that holds config.json and the weights."):
        convert(tmp_path / name, tmp_path / "out", progress=False)


def test_foreign_files_beside_the_weights_do_no_harm(maverick, tmp_path):
    """Repositories hold several formats at once."""
    source = shutil.copytree(maverick.source, tmp_path / "source")
    for name in ("llama.gguf", "pytorch_model.bin", "consolidated.00.pth"):
        (source / name).write_bytes(b"something else")
    assert convert(source, tmp_path / "out", progress=False).kind == "Hugging Face"
