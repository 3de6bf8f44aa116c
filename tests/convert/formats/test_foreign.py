"""What people have in the place of a checkpoint that is read: told by its name, with what to do, and the same from every way in."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from maverick_jax.checkpoint import load
from maverick_jax.cli.plan import model_config as plan_config
from maverick_jax.convert import convert, export, inspect, open_model_directory, open_source
from maverick_jax.convert.build.estimate import estimate
from maverick_jax.convert.proof.verify import verify

INSTEAD = "use the bfloat16 checkpoint or the official FP8 one."
BASE = "meta-llama/Llama-4-Scout-17B-16E-Instruct"
LLAMA3 = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024, "use_scaled_rope": True}


def edit(name: str, **values):
    """A JSON file with these values; a value of None is taken out."""

    def change(source):
        old = json.loads((source / name).read_text()) if (source / name).is_file() else {}
        (source / name).write_text(json.dumps({key: value for key, value in (old | values).items() if value is not None}))

    return change


def say(**quantization):
    """A config with this quantization_config."""
    return edit("config.json", quantization_config=quantization)


def compressed(form: str, **weights):
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True} | weights}
    return say(quant_method="compressed-tensors", format=form, config_groups={"group_0": group})


def only(*names: str, **contents: dict):
    """These files of the directory alone, and JSON files with these contents."""

    def change(source):
        for file in source.iterdir():
            if file.name not in names:
                file.unlink()
        for name, values in contents.items():
            (source / f"{name}.json").write_text(json.dumps(values))

    return change


def replace_weights(*names: str):
    """The weights are in files of these names instead."""

    def change(source):
        for file in source.glob("model*"):
            file.unlink()
        for name in names:
            (source / name).write_bytes(b"GGUF or PK or whatever it begins with")

    return change


def both(*changes):
    return lambda source: [change(source) for change in changes]


def adapter(**values):
    return both(only("tokenizer.json", adapter_config={"peft_type": "LORA", "r": 8} | values), replace_weights("adapter_model.safetensors"))


def hide(inside: str):
    """The checkpoint in a folder of the directory."""

    def change(source):
        files = list(source.iterdir())
        (source / inside).mkdir(parents=True)
        for file in files:
            file.rename(source / inside / file.name)
        (source / "blobs").mkdir()

    return change


def draft(**values):
    return edit("config.json", text_config=None, vision_config=None, model_type="llama", **values)


HEAD = "and no model itself: give the model that it drafts for."
FOREIGN = {
    "ModelOpt FP8": (
        say(quant_method="modelopt", quant_algo="FP8"),
        f"config.json: quant_method 'modelopt' (FP8) is not supported: {INSTEAD}",
    ),
    "ModelOpt NVFP4": (say(quant_method="modelopt", quant_algo="NVFP4"), "config.json: quant_method 'modelopt' (NVFP4) is not supported"),
    "ModelOpt's own file": (
        edit("hf_quant_config.json", quantization={"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}),
        "hf_quant_config.json: quantized by NVIDIA ModelOpt, which is not supported: " + INSTEAD,
    ),
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
    "a method that is all": (
        edit("config.json", quantization_config="compressed-tensors"),
        "config.json: quant_method ['compressed-tensors'] is not supported",
    ),
    "nothing": (only(), "source is not a checkpoint: it has neither config.json nor params.json."),
    "a method without a name": (say(bits=4), "config.json: quant_method None is not supported"),
    "MLX": (
        edit("config.json", quantization={"group_size": 64, "bits": 4}),
        "config.json: quantized by MLX (4 bits), which is not supported",
    ),
    "AutoGPTQ's own file": (edit("quantize_config.json", bits=4), "quantize_config.json: quantized by AutoGPTQ, which is not supported"),
    "AutoAWQ's own file": (edit("quant_config.json", w_bit=4), "quant_config.json: quantized by AutoAWQ, which is not supported"),
    "an adapter": (
        adapter(base_model_name_or_path=BASE),
        f"source is an adapter (LORA) of the base model {BASE}, and no model itself: merge it",
    ),
    "another adapter": (
        adapter(peft_type="IA3"),
        "source is an adapter (IA3) of the base model that it does not name, and no model itself",
    ),
    "an adapter's weights alone": (
        both(only(), replace_weights("adapter_model.bin")),
        "source is an adapter (LoRA) of the base model that it does not name",
    ),
    "an Eagle head": (draft(architectures=["LlamaForCausalLMEagle3"]), f"source is a draft head for speculative decoding (eagle), {HEAD}"),
    "another Eagle head": (draft(architectures=["EagleLlama4ForCausalLM"], draft_vocab_size=32000), f"decoding (eagle), {HEAD}"),
    "a head of Medusa": (draft(model_type_of="x", architectures=["MedusaModel"]), f"decoding (medusa), {HEAD}"),
    "a head of speculators": (draft(speculators_model_type="eagle3"), f"decoding (eagle), {HEAD}"),
    "a head without a name": (draft(architectures=["LlamaForCausalLM"], draft_vocab_size=32000), f"decoding (draft_vocab_size), {HEAD}"),
    "diffusers": (
        both(only(), edit("model_index.json", _class_name="FluxPipeline")),
        "source is a pipeline of diffusers, which is not read",
    ),
    "Llama 3": (
        edit("config.json", model_type="llama", architectures=["LlamaForCausalLM"]),
        "config.json: model_type is 'llama', not 'llama4' or 'llama4_text': this is not a Llama 4 checkpoint.",
    ),
    "Meta's Llama 3": (
        both(only(params=LLAMA3), replace_weights("consolidated.00.pth")),
        "source is of another family, such as Llama 3, by its params.json: give a Llama 4 checkpoint.",
    ),
    "a tokenizer alone": (only("tokenizer.json"), "source holds a tokenizer alone: fetch config.json and the weights too."),
    "a folder of the Hub's cache": (
        hide("snapshots/0123"),
        "source is a folder of the Hub's cache: give the one in its snapshots that holds",
    ),
    "a config without end": (
        lambda s: (s / "config.json").write_text(" " * (16 << 20) + "{}"),
        "config.json has 16,777,218 bytes, more than",
    ),
    "GGUF": (
        replace_weights("Llama-4-Q4_K_M.gguf"),
        "source holds GGUF (llama.cpp) files, which are not read: use the safetensors or .pth checkpoint.",
    ),
    "PyTorch .bin": (replace_weights("pytorch_model.bin"), "source holds PyTorch .bin files, which are not read"),
    "PyTorch .bin in shards": (
        replace_weights("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
        "source holds PyTorch .bin files, which are not read",
    ),
    "torch.distributed": (replace_weights("__0_0.distcp", ".metadata"), "source holds torch.distributed files, which are not read"),
    "Flax": (replace_weights("flax_model.msgpack"), "source holds Flax msgpack files, which are not read"),
}
METHODS = ("awq", "gptq", "bitsandbytes", "hqq", "eetq", "torchao", "fbgemm_fp8", "fp8", "mxfp4", "quanto", "auto-round")
FOREIGN |= {
    method: (say(quant_method=method, bits=4), f"config.json: quant_method '{method}' is not supported: {INSTEAD}") for method in METHODS
}


def ways_in(directory: Path, model: Path, out: Path):
    """Everything that takes a checkpoint or a model directory."""
    return {
        "convert": lambda: convert(directory, out, progress=False),
        "convert --dry-run": lambda: estimate(directory, out),
        "inspect": lambda: inspect(directory),
        "verify": lambda: verify(directory, progress=False),
        "verify --against": lambda: verify(model, directory, progress=False),
        "export": lambda: export(directory, out, progress=False),
        "load": lambda: load(directory),
        "plan": lambda: plan_config(str(directory)),
    }


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_read_is_refused_by_name_and_the_same_everywhere(maverick, tmp_path, kind, refused):
    """Read as bfloat16, its bytes would be weights that look like weights; unnamed, its owner would not know what to fetch."""
    change, message = FOREIGN[kind]
    source = shutil.copytree(maverick.source, tmp_path / "source")
    change(source)
    said = set()
    for use in ways_in(source, maverick.converted, tmp_path / "out").values():
        with refused(message) as error:
            use()
        said.add(str(error.value))
    assert len(said) == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name,kind", [("llama.gguf", "a GGUF (llama.cpp) file, which is not read"), ("model.safetensors", "a file")])
def test_a_file_in_the_place_of_a_directory_is_named(maverick, tmp_path, name, kind, refused):
    """Users of llama.cpp give the one file that they have."""
    (tmp_path / name).write_bytes(b"GGUF")
    for use in ways_in(tmp_path / name, maverick.converted, tmp_path / "out").values():
        with refused(f"{name} is {kind}: give the directory that holds config.json and the weights."):
            use()


def test_the_weights_of_a_model_directory_are_not_the_directory(maverick, tmp_path, refused):
    """A level too low."""
    for use in ways_in(maverick.converted / "params", maverick.converted, tmp_path / "out").values():
        with refused("params is the weights alone of a model directory: give the directory above it."):
            use()


def test_packed_bytes_that_no_config_mentions_are_refused(maverick, tmp_path, refused):
    """NVFP4's bytes of two values under a name of ours."""
    source = shutil.copytree(maverick.source, tmp_path / "source")
    file = next(file for file in sorted(source.glob("*.safetensors")))
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    save_file(tensors | {name: tensors[name][:, ::2].byte().contiguous()}, file, metadata={"format": "pt"})
    with refused(f"{name} has dtype uint8; bfloat16, float16, float32, float8_e4m3fn are supported."):
        open_source(source)


READ = {
    "other formats beside the weights": lambda s: [(s / name).write_bytes(b"x") for name in ("llama.gguf", "pytorch_model.bin", "a.pth")],
    "an adapter's config left by a merge": edit("adapter_config.json", peft_type="LORA", base_model_name_or_path=BASE),
    "a config of something else that is broken": lambda s: [(s / f"{name}.json").write_text("{") for name in ("params", "adapter_config")],
    "a cache in FP8, said by ModelOpt": edit("hf_quant_config.json", quantization={"quant_algo": None, "kv_cache_quant_algo": "FP8"}),
    "a cache in FP8, said by compressed-tensors": say(
        quant_method="compressed-tensors", format="dense", config_groups={}, kv_cache_scheme={"num_bits": 8, "type": "float"}
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_what_lies_beside_plain_weights_does_no_harm(maverick, tmp_path, kind):
    """Repositories hold several formats at once, and traces of what was done to them."""
    source = shutil.copytree(maverick.source, tmp_path / "source")
    READ[kind](source)
    assert open_source(source).parameters == open_source(maverick.source).parameters
    assert open_source(source).kind == "Hugging Face"


def test_a_model_directory_is_none_of_these(cases):
    for case in cases.values():
        assert open_model_directory(case.converted).notes == ()
