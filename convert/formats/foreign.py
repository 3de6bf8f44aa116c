"""What people have in the place of a checkpoint that is read: by what it is recognised, and what to do.

Every command looks here first, so that all of them give one reason, before a config or a weight is looked at closely.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from maverick_jax.config import Config
from maverick_jax.convert.formats.agreement import some_of
from maverick_jax.convert.formats.companions import MANIFEST, PARAMS
from maverick_jax.convert.formats.quantization import is_fp8
from maverick_jax.convert.formats.shards import INDEX
from maverick_jax.errors import UserError
from maverick_jax.json_file import read_json

FORMATS = {  # of files of weights: they count where there are none that are read
    "*.gguf": "GGUF (llama.cpp)",
    "pytorch_model*.bin": "PyTorch .bin",
    "*.distcp": "torch.distributed",
    "*.nemo": "NeMo",
    "*.msgpack": "Flax msgpack",
    "*.h5": "TensorFlow",
    "*.onnx": "ONNX",
    "*.engine": "TensorRT",
    "*.pte": "ExecuTorch",
    "openvino_model*": "OpenVINO",
}
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".xz", ".zst", ".bz2", ".7z", ".rar")
READ = ("config.json", "params.json", MANIFEST, INDEX, "*.safetensors", "*.pth", "fp8_scales_*.pt", "tokenizer.json", "tokenizer.model")
DRAFTS = ("eagle", "medusa", "speculator")  # in what the config calls its model
DESCRIPTIONS = ("config.json", "params.json")
META_HAS = {"moe_args", "vision_args", "nope_layer_interval", "attention_chunk_size", "attn_temperature_tuning", "use_qk_norm"}


@dataclasses.dataclass(frozen=True)
class Looks:
    """What a directory looks like from outside.

    Attributes:
      files: names in it.
      config: what `config.json` holds; nothing where there is none.
    """

    directory: Path
    files: frozenset[str]
    config: dict[str, Any]

    @classmethod
    def of(cls, directory: Path) -> Looks:
        return cls(directory, frozenset(os.listdir(directory)), read_optional(directory / "config.json"))

    def has(self, *patterns: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in self.files for pattern in patterns)

    @property
    def has_weights(self) -> bool:
        """Whether there are files of weights that may be read."""
        others = ("adapter_model", "diffusion_pytorch_model")
        safetensors = any(name.endswith(".safetensors") and not name.startswith(others) for name in self.files)
        return safetensors or self.has(INDEX, PARAMS, "*.pth")


def _no_file(looks: Looks) -> str:
    """What has the name of a file that is read, and is none."""
    for name in sorted(name for name in looks.files if any(fnmatchcase(name, pattern) for pattern in READ)):
        file = looks.directory / name
        try:
            mode = file.stat().st_mode
        except FileNotFoundError:
            return f"has {name}, a link to {os.readlink(file)}, which is not there, as if a download was removed in part: fetch it again."
        except OSError as error:
            return f"has {name}, which cannot be read ({error.strerror}): fetch it again, or put the file itself in its place."
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
            return f"has {name}, which is {kind} and no file: put the file itself in its place."
    return ""


def _model(looks: Looks) -> str:
    if not looks.has(MANIFEST) or not (looks.directory / PARAMS).is_dir():
        return ""
    return (
        "is a model directory, converted already: use it as it is, name another --format to make one of it, or turn it back with "
        "`maverick export`."
    )


def _adapter(looks: Looks) -> str:
    if looks.has_weights or not looks.has("adapter_config.json", "adapter_model*"):
        return ""
    adapter = read_optional(looks.directory / "adapter_config.json")
    kind, base = adapter.get("peft_type") or "LoRA", adapter.get("base_model_name_or_path") or "that it does not name"
    return f"is an adapter ({kind!s:.40}) of the base model {base!s:.200}, and no model itself: merge it into that model first."


def _draft(looks: Looks) -> str:
    called = " ".join(str(looks.config.get(name)) for name in ("architectures", "model_type", "speculators_model_type")).lower()
    found = next((word for word in DRAFTS if word in called), "draft_vocab_size" if "draft_vocab_size" in looks.config else "")
    return f"is a draft head for speculative decoding ({found}), and no model itself: give the model that it drafts for." if found else ""


def _pipeline(looks: Looks) -> str:
    return "is a pipeline of diffusers, which is not read: give a Llama 4 checkpoint." if looks.has("model_index.json") else ""


def _family(looks: Looks) -> str:
    if looks.config and looks.config.get("model_type") not in ("llama4", "llama4_text"):
        Config.from_directory(looks.directory)  # says so itself
    params = {} if looks.config else read_optional(looks.directory / "params.json")
    inner = params.get("model")
    if not params or META_HAS & {*params, *(inner if isinstance(inner, dict) else ())}:
        return ""
    return "is of another family, such as Llama 3, by its params.json: give a Llama 4 checkpoint."


def _quantized(looks: Looks) -> str:
    is_fp8(looks.directory, looks.config, looks.files)  # says so itself
    return ""


def _format(looks: Looks) -> str:
    found = "" if looks.has_weights else next((kind for pattern, kind in FORMATS.items() if looks.has(pattern)), "")
    return f"holds {found} files, which are not read: use the safetensors or .pth checkpoint." if found else ""


def _folder(looks: Looks) -> str:
    """One too high or too low."""
    if looks.files >= {"blobs", "snapshots"}:
        return "is a folder of the Hub's cache: give the one in its snapshots that holds config.json."
    if looks.has("_CHECKPOINT_METADATA") and (looks.directory.parent / MANIFEST).is_file():
        return "is the weights alone of a model directory: give the directory above it."
    return ""


def _tokenizer(looks: Looks) -> str:
    alone = looks.has("tokenizer*") and not looks.has_weights and not looks.has("config.json", "params.json")
    return "holds a tokenizer alone: fetch config.json and the weights too." if alone else ""


def _nothing(looks: Looks) -> str:
    if looks.has_weights or looks.has("config.json", "params.json"):
        return ""
    inside = [name for name in sorted(looks.files) if any((looks.directory / name / file).is_file() for file in DESCRIPTIONS)]
    if inside:
        return f"is not a checkpoint, but holds {some_of(inside)}: give one of its folders, such as {looks.directory / inside[0]}."
    return "is not a checkpoint: it has neither config.json nor params.json."


KINDS = (_no_file, _model, _adapter, _draft, _pipeline, _family, _quantized, _format, _folder, _tokenizer, _nothing)


def refuse_foreign(directory: Path) -> Looks:
    """Refuse what is no directory, or is recognised as something that is not read.

    Raises:
      UserError: says what it is.
    """
    check_directory(directory)
    try:
        looks = Looks.of(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}.") from error
    for kind in KINDS:
        if reason := kind(looks):
            raise UserError(f"{directory} {reason}")
    return looks


def read_optional(file: Path) -> dict[str, Any]:
    """What a file of JSON holds; nothing where there is none."""
    return read_json(file) if file.is_file() else {}


def check_directory(directory: Path) -> None:
    """Refuse what is no directory, or none that may be read."""
    try:
        if directory.is_dir():
            if not os.access(directory, os.R_OK | os.X_OK):
                raise UserError(f"{directory} cannot be read (Permission denied): give yourself the right to.")
            return
    except OSError as error:
        raise UserError(f"{directory} cannot be opened: {error.strerror}.") from error
    if directory.is_symlink():
        raise UserError(f"{directory} is a link that leads nowhere or in a circle: give the directory itself.")
    if directory.is_file():
        if directory.suffix in ARCHIVES:
            raise UserError(f"{directory} is an archive: unpack it, and give the directory that holds config.json and the weights.")
        kind = FORMATS.get(f"*{directory.suffix}")
        what = f"a {kind} file, which is not read" if kind else "a file"
        raise UserError(f"{directory} is {what}: give the directory that holds config.json and the weights.")
    if directory.exists():
        raise UserError(f"{directory} is a pipe, socket or device: give the directory that holds config.json and the weights.")
    raise UserError(f"{directory} does not exist: give the directory that holds config.json and the weights.")
