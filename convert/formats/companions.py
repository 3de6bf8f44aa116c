"""What lies in a directory beside the weights: config, tokenizer, template and licence files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from maverick_jax.errors import UserError
from maverick_jax.json_file import read_json

MANIFEST = "manifest.json"  # of a model directory: without it, it is unfinished
PARAMS = "params"  # of a model directory: an Orbax checkpoint of its own
TEMPLATES = "additional_chat_templates"  # a folder of named ones
COMPANIONS = (  # what a checkpoint has beside its weights
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer*",
    "chat_template*",
    f"{TEMPLATES}/*.jinja",
    "LICENSE*",
    "USE_POLICY*",
)
MAX_COMPANION = 256 << 20  # bytes; Llama 4's tokenizer has 28 million
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


def find_companions(directory: Path) -> list[Path]:
    """The config, tokenizer, template and licence files of a directory; folders and pipes of such names are none.

    A link is followed to what lies in the directory itself, and from a snapshot in the Hugging Face Hub's cache to that cache's blobs. To
    any other place it could be a stranger's choice among the files of this machine, and would end in a directory that is published.

    Raises:
      UserError: a link that leads elsewhere or nowhere, or a file too large for what its name says.
    """
    home = Path(os.path.realpath(directory))
    roots = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    found = []
    for file in sorted({file for pattern in COMPANIONS for file in directory.glob(pattern)}):
        if file.is_dir():
            continue
        target = Path(os.path.realpath(file))
        if not any(target.is_relative_to(root) for root in roots):  # a link, or in a folder that is one
            raise UserError(f"{file} is a link to {target}, outside the checkpoint: put the file itself in its place, or remove the link.")
        if file.is_symlink() and not target.exists():
            raise UserError(f"{file} is a link that leads nowhere or in a circle: fetch the file again, or remove the link.")
        if not file.is_file():
            continue
        if (size := file.stat().st_size) > MAX_COMPANION:
            raise UserError(f"{file} has {size:,} bytes, more than the {MAX_COMPANION:,} of any such file: fetch it again, or remove it.")
        if not os.access(file, os.R_OK):
            raise UserError(f"{file} cannot be read (Permission denied): give yourself the right to, or remove it.")
        found.append(file)
    return found


def copy_companions(source: Path, destination: Path) -> None:
    """Copy what is there of config, tokenizer, template and licence files, as `find_companions` has them."""
    for file in find_companions(source):
        copy = destination / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def describe_weights(file: Path, *, dtype: str | None, fp8: bool) -> None:
    """Make `config.json` say what the weights are; it stays as it is, byte for byte, where it says so already.

    Args:
      dtype: of weights and activations; None leaves what it says.
      fp8: whether there are FP8 weights.
    """
    values = read_json(file)
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
