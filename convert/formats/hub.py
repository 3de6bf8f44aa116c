"""Checkpoints from the Hugging Face Hub: what is read of a repository is fetched, and nothing else."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Collection
from pathlib import Path

from maverick_jax.convert.formats.companions import COMPANIONS, MANIFEST, PARAMS
from maverick_jax.convert.formats.meta import FILES, SCALES
from maverick_jax.convert.formats.shards import INDEX
from maverick_jax.errors import UserError
from maverick_jax.json_file import read_json

ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
PAGE = re.compile(rf"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)({ID.pattern})", re.ASCII)
DESCRIPTIONS = (*COMPANIONS, "params.json", INDEX, MANIFEST, "adapter_config.json", "hf_quant_config.json")
LIKE = 0.8  # of two names, by `difflib`
REASONS = {  # what the Hub's client raises -> what it means, and what to do
    "GatedRepoError": "it is gated; accept its terms at https://huggingface.co/{name}, then log in with `hf auth login`.",
    "RepositoryNotFoundError": "there is no such repository, or it is private; check its name, or log in with `hf auth login`.",
    "LocalEntryNotFoundError": "there is no network, and it is not in the cache; give a directory, or try again with a network.",
}
OFFLINE = "HF_HUB_OFFLINE is set, and it is not in the cache; unset it, or give a directory."


def refuse_page(address: str) -> None:
    """Refuse the address of a repository's page, of which the id is enough."""
    if found := PAGE.match(address):
        raise UserError(f"{address} is an address: give the Hub's id, {found[1]}.")


def is_id(name: str) -> bool:
    """Whether it could be a repository's: `org/name`."""
    return ID.fullmatch(name) is not None


def download(name: str, *, weights: bool = True) -> Path:
    """The local copy of a repository: config, tokenizer, template and licence, and the weights, unless they are not asked for: those of a
    model directory, else those in safetensors, else Meta's.

    Raises:
      UserError: it looks like a path here, and nobody is asked; `huggingface_hub` is not installed; or the Hub has no such repository
        for us.
    """
    _check_no_path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name} is no directory here; to fetch it from the Hugging Face Hub, pip install 'maverick-jax[hub]'.") from None

    def fetch(patterns: Collection[str], revision: str | None = None) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=[*patterns], ignore_patterns=_deeper(patterns), revision=revision))
        except Exception as error:  # the Hub's client raises many kinds: offline, gated, not found
            said = f"{name} is no directory here and could not be fetched from the Hugging Face Hub"
            raise UserError(f"{said}: {_reason(name, error)}") from error

    directory = fetch(DESCRIPTIONS)
    if not weights:
        return directory
    revision = directory.name  # the rest is of the same, though somebody changes the repository meanwhile
    if (directory / MANIFEST).is_file():
        return fetch([f"{PARAMS}/**"], revision)
    directory = fetch(_shards(directory), revision)
    if any(directory.glob("*.safetensors")):
        return directory
    return fetch([FILES, SCALES, "*int4*.pt"], revision)


def _reason(name: str, error: Exception) -> str:
    """By the names of its classes, for they have been in several modules."""
    kind = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in REASONS), None)
    if kind == "LocalEntryNotFoundError" and os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return OFFLINE
    return REASONS[kind].format(name=name) if kind else str(error)


def _deeper(patterns: Collection[str]) -> list[str]:
    """What `*` shall not reach: for the Hub it takes slashes too, and `tokenizer*` would fetch what is in a folder of that name."""
    return [f"{pattern.partition('*')[0]}*/*" for pattern in patterns if "*" in pattern and "**" not in pattern]


def _shards(directory: Path) -> list[str]:
    """The files of the index, or what they are called where there is none."""
    if (directory / INDEX).is_file():
        named = read_json(directory / INDEX).get("weight_map")
        if isinstance(named, dict) and named and all(isinstance(file, str) for file in named.values()):
            return sorted(set(named.values()))
    return ["model*.safetensors"]


def _check_no_path(name: str) -> None:
    """A path with a slip in it, of which the Hub need not hear: its first part is a directory here, or it is like one that is."""
    first, last = name.split("/")
    folders = [first] if os.path.isdir(first) else difflib.get_close_matches(first, _directories("."), cutoff=LIKE)
    like = [f"{folder}/{found}" for folder in folders for found in difflib.get_close_matches(last, _directories(folder), cutoff=LIKE)]
    fetched = f"to fetch it from the Hugging Face Hub, `hf download {name}`, and give the directory that this prints."
    if like:
        raise UserError(f"{name} does not exist: did you mean {' or '.join(like)}? Or {fetched}")
    if first in folders:
        raise UserError(f"{name} does not exist, and {first} is a directory here: check the path; or {fetched}")


def _directories(folder: str) -> list[str]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_dir()]
    return []
