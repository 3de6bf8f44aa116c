"""Which kind of checkpoint a directory holds: looked at, not asked for."""

from __future__ import annotations

from pathlib import Path

from maverick_jax.config import Config
from maverick_jax.config.checks import path_of
from maverick_jax.convert.formats.foreign import refuse_foreign
from maverick_jax.convert.formats.huggingface import open_huggingface
from maverick_jax.convert.formats.meta import open_meta
from maverick_jax.convert.formats.source import Source
from maverick_jax.errors import UserError


def open_source(directory: str | Path) -> Source:
    """The parameters of a PyTorch checkpoint: Hugging Face (plain, FP8) or Meta's `.pth` (plain, FP8).

    Raises:
      UserError: there is none, it is damaged or incomplete, or it is of a kind that is not read, which is named.
    """
    directory = local_path(directory)
    looks = refuse_foreign(directory)
    config = Config.from_directory(directory)
    if looks.has("*.pth") and not looks.has("*.safetensors", "*.safetensors.index.json"):
        return open_meta(directory, config)
    return open_huggingface(directory, config)


def local_path(path: str | Path) -> Path:
    """A path on a disk.

    Raises:
      UserError: no path, or an address in an object store, where a directory cannot be renamed.
    """
    if "://" in str(path):
        raise UserError(f"{path} is no directory of a disk: convert on a disk, then copy the result there.")
    return path_of("path", path)
