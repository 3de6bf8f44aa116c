"""Which kind of checkpoint a directory holds: looked at, not asked for."""

from __future__ import annotations

import os
import re
from pathlib import Path

from maverick_jax.config import Config
from maverick_jax.config.checks import path_of
from maverick_jax.convert.formats import hub
from maverick_jax.convert.formats.foreign import check_directory, refuse_foreign
from maverick_jax.convert.formats.huggingface import open_huggingface
from maverick_jax.convert.formats.meta import open_meta
from maverick_jax.convert.formats.source import Source
from maverick_jax.errors import UserError

SLIP = re.compile(r"([a-z][a-z0-9]+):/(?!/)(.*)")  # an address with one slash too few


def open_source(directory: str | Path) -> Source:
    """The parameters of a PyTorch checkpoint: Hugging Face (plain, FP8) or Meta's `.pth` (plain, FP8).

    Args:
      directory: where it is, or a Hub id ("org/name"), which is fetched.

    Raises:
      UserError: there is none, it is damaged or incomplete, or it is of a kind that is not read, which is named.
    """
    directory = find_directory(directory)
    looks = refuse_foreign(directory)
    config = Config.from_directory(directory)
    if looks.has("*.pth") and not looks.has("*.safetensors", "*.safetensors.index.json"):
        return open_meta(directory, config)
    return open_huggingface(directory, config)


def find_directory(path: str | Path, *, weights: bool = True) -> Path:
    """A directory of a disk, or what is fetched of a repository of the Hub, with or without the weights.

    Raises:
      UserError: no path, no such directory, or nothing could be fetched.
    """
    directory = local_path(path)
    if _is_on_hub(path):
        return hub.download(str(path), weights=weights)
    check_directory(directory)
    return directory


def refuse_download(path: str | Path) -> None:
    """For what shall write nothing.

    Raises:
      UserError: a repository of the Hub, which would have to be fetched.
    """
    if _is_on_hub(path):
        raise UserError(f"{path} is no directory here, and a dry run fetches nothing: `hf download {path}` first.")


def _is_on_hub(path: str | Path) -> bool:
    return not os.path.lexists(path) and hub.is_id(str(path))


def local_path(path: str | Path) -> Path:
    """A path on a disk; `~` is the home directory.

    Raises:
      UserError: no path, or an address in an object store or on the web, where a directory cannot be renamed.
    """
    local = path_of("path", path)
    hub.refuse_page(str(path))
    if "://" in str(path):
        raise UserError(f"{path} is no directory of a disk: first copy what is to be read to one, or later what was made.")
    if (slip := SLIP.fullmatch(str(path))) and not os.path.exists(path):
        raise UserError(f"{path} does not exist: did you mean {slip[1]}://{slip[2]}?")
    return local
