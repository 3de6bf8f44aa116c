"""How a Hugging Face checkpoint says that it is quantized: as the official FP8 one, or in a way that is not read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from maverick_jax.convert.formats.companions import FP8_METHOD, FP8_WEIGHTS
from maverick_jax.convert.formats.spelling import Spelling
from maverick_jax.errors import UserError
from maverick_jax.json_file import read_json
from maverick_jax.ops.quantize import FORMATS

FP8 = FORMATS["fp8"].values
INSTEAD = "use the bfloat16 checkpoint or the official FP8 one."
OTHER_FILES = {  # configs beside config.json: name -> what writes it
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "quantize_config.json": "AutoGPTQ",
    "quant_config.json": "AutoAWQ",
    "quant_model_description.json": "msmodelslim",
    "quanto_qmap.json": "Quanto",
    "qmodel.pt": "HQQ",
}


def is_fp8(directory: Path, config: Mapping[str, Any], files: Collection[str]) -> bool:
    """Whether the config says that the weights are quantized as in the official FP8 checkpoint.

    Args:
      config: the contents of its `config.json`.
      files: names in the directory.

    Raises:
      UserError: names any other way.
    """
    file, found = directory / "config.json", config.get("quantization_config")
    if isinstance(mlx := config.get("quantization"), dict) and "bits" in mlx:
        raise UserError(f"{file}: quantized by MLX ({mlx['bits']} bits), which is not supported: {INSTEAD}")
    if found is None:
        for name, tool in OTHER_FILES.items():
            if name in files and not _is_of_the_cache(directory / name):
                raise UserError(f"{directory / name}: quantized by {tool}, which is not supported: {INSTEAD}")
        return False
    found = found if isinstance(found, dict) else {"quant_method": [found]}  # a list is the name of none
    if (method := found.get("quant_method")) != FP8_METHOD["quant_method"]:
        detail = f" ({found['quant_algo']})" if found.get("quant_algo") else ""
        raise UserError(f"{file}: quant_method {method!r:.100}{detail} is not supported: {INSTEAD}")
    groups = found.get("config_groups")
    if groups == {} and found.get("kv_cache_scheme"):  # of the cache alone
        return False
    weights = [group.get("weights") if isinstance(group, dict) else None for group in (groups.values() if isinstance(groups, dict) else [])]
    weights = [some if isinstance(some, dict) else {} for some in weights or [None]]
    wrong = {"format": found.get("format")} if found.get("format") != FP8_METHOD["format"] else {}
    wrong |= {name: some.get(name) for some in weights for name, value in FP8_WEIGHTS.items() if some.get(name) != value}
    if wrong:
        text = ", ".join(f"{name} {value!r:.100}" for name, value in wrong.items())
        raise UserError(f"{file}: compressed-tensors with {text} is not supported: {INSTEAD}")
    return True


def _is_of_the_cache(file: Path) -> bool:
    """Whether only keys and values are quantized at inference: ModelOpt says so of checkpoints whose weights are plain."""
    found = read_json(file).get("quantization") if file.suffix == ".json" else None
    return isinstance(found, dict) and found.get("quant_algo") is None and found.get("kv_cache_quant_algo") is not None


def check_scales(directory: Path, spelling: Spelling, values: Collection[str]) -> None:
    """FP8 tensors are routed experts with a scale beside them, of which the config knows; other weights have no scale.

    Args:
      values: those that may be FP8, by the names of our tables.
    """
    quantized = is_fp8(directory, read_json(directory / "config.json"), ())
    for ours, tensor in spelling.tensors.items():
        scale, inputs = f"{ours}_scale", f"{ours.removesuffix('.weight')}.input_scale"
        name = f"{tensor.file}: {spelling.spell(ours)}"
        if tensor.dtype != FP8:
            if scale in spelling.tensors:  # nobody can say whether the weight has been multiplied by it
                raise UserError(f"{name} is {tensor.dtype} and has {spelling.spell(scale)} beside it, as FP8 values have: {INSTEAD}")
        elif not quantized:
            raise UserError(f"{name} is FP8, but config.json has no quantization_config: {INSTEAD}")
        elif ours not in values:
            raise UserError(f"{name} is FP8; of Hugging Face checkpoints only the routed experts may be: {INSTEAD}")
        elif scale not in spelling.tensors:
            raise UserError(
                f"{directory} has FP8 values {spelling.spell(ours)} but no {spelling.spell(scale)}: fetch the checkpoint again."
            )
        elif inputs in spelling.tensors:
            raise UserError(f"{name} is FP8 with a fixed scale of its inputs, {spelling.spell(inputs)}, which is not supported: {INSTEAD}")
