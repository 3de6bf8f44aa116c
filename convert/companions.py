"""What lies in a directory beside the weights: config, tokenizer, template and licence files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

PARAMS = "params"  # of a model directory: an Orbax checkpoint of its own
COMPANIONS = (  # what a checkpoint has beside its weights
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer*",
    "chat_template*",
    "LICENSE*",
    "USE_POLICY*",
)
FP8_METHOD = {"quant_method": "compressed-tensors", "format": "float-quantized"}
FP8_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
FP8_CONFIG = {  # what the official checkpoint says: static weights, activations quantized per token as they come
    **FP8_METHOD,
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**FP8_WEIGHTS, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
            "output_activations": None,
        }
    },
    "ignore": [
        "re:.*lm_head",
        "re:.*self_attn.*",
        "re:.*router",
        "re:.*shared_expert.*",
        r"re:.*feed_forward\.(gate|up|down)_proj",
        "re:.*vision_model.*",
        "re:.*multi_modal_projector.*",
    ],
}


def copy_companions(source: Path, destination: Path) -> None:
    """Copy what is there of config, tokenizer, template and licence files."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, destination / file.name)


def describe_weights(file: Path, *, dtype: str | None, fp8: bool) -> None:
    """Make `config.json` say what the weights are; it stays as it is, byte for byte, where it says so already.

    Args:
      dtype: of weights and activations; None leaves what it says.
      fp8: whether there are FP8 weights.
    """
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    before = json.dumps(values)
    if dtype is not None:
        parts = [part for part in (values, values.get("text_config"), values.get("vision_config")) if isinstance(part, dict)]
        named = [(part, name) for part in parts for name in ("dtype", "torch_dtype") if part.get(name) is not None]
        for part, name in named or [(values, "dtype")]:
            part[name] = dtype
    if not fp8:
        values.pop("quantization_config", None)
    elif "quantization_config" not in values:
        values["quantization_config"] = FP8_CONFIG
    if json.dumps(values) != before:
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
