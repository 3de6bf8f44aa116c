"""Which kind of checkpoint a directory holds: looked at, not asked for."""

from __future__ import annotations

from pathlib import Path

from maverick_jax.config import Config
from maverick_jax.convert.building import local_path
from maverick_jax.convert.huggingface import open_huggingface
from maverick_jax.convert.meta import open_meta
from maverick_jax.convert.source import Source
from maverick_jax.errors import UserError

FOREIGN = {  # files of formats that are not read
    "*.gguf": "GGUF (llama.cpp)",
    "pytorch_model*.bin": "PyTorch .bin",
    "*.msgpack": "Flax msgpack",
    "*.onnx": "ONNX",
}


def open_source(directory: str | Path) -> Source:
    """The parameters of a PyTorch checkpoint: Hugging Face (bfloat16, FP8) or Meta's `.pth` (bfloat16, FP8).

    Raises:
      UserError: there is none, it is damaged or incomplete, or it is of a kind that is not read, which is named.
    """
    directory = local_path(directory)
    _check_directory(directory)
    weights = any(directory.glob("*.safetensors")) or any(directory.glob("*.safetensors.index.json"))
    if not weights and any(directory.glob("*.pth")):
        return open_meta(directory, Config.from_directory(directory))
    if not weights:
        for pattern, kind in FOREIGN.items():
            if any(directory.glob(pattern)):
                raise UserError(f"{directory} holds {kind} files, which are not read: use the safetensors or .pth checkpoint.")
    return open_huggingface(directory, Config.from_directory(directory))


def _check_directory(directory: Path) -> None:
    try:
        if directory.is_dir():
            return
    except OSError as error:
        raise UserError(f"{directory} cannot be opened: {error.strerror}.") from error
    if directory.is_symlink():
        raise UserError(f"{directory} is a link that leads nowhere or in a circle: give the directory itself.")
    if directory.is_file():
        kind = FOREIGN.get(f"*{directory.suffix}")
        what = f"a {kind} file, which is not read" if kind else "a file"
        raise UserError(f"{directory} is {what}: give the directory that holds config.json and the weights.")
    raise UserError(f"{directory} does not exist: give the directory that holds config.json and the weights.")
