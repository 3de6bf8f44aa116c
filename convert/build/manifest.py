"""`manifest.json`: where a model directory comes from, and digests of all that it holds.

It is the last file to be written: without it a directory is unfinished. Its own digest is its last entry.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from maverick_jax.convert.build.digest import digest_file
from maverick_jax.convert.build.journal import NAME
from maverick_jax.convert.formats.companions import MANIFEST
from maverick_jax.convert.formats.places import Shape
from maverick_jax.errors import UserError
from maverick_jax.json_file import read_json

FORMAT = 1
ANY = "any name"
FORM: dict[str, Any] = {  # of what is read again; the rest is for people
    "files": {ANY: str},
    "quantize": [str],
    "source": {ANY: {"sha256": str}},
    "target": str,
    "tensors": {ANY: {"shape": [int], "dtype": str, "rounds": bool, "digest": str}},
}
LIBRARIES = ("jax", "orbax-checkpoint", "tensorstore", "numpy", "xxhash")


def write_manifest(directory: Path, parameters: Mapping[str, tuple[Shape, np.dtype]], **facts: Any) -> None:
    """Describe what `directory` holds.

    Args:
      facts: more about it; those that are None are left out.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "maverick_jax": _version("maverick-jax"),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "parameters": count_parameters(parameters),
        "bytes": sum(math.prod(shape) * dtype.itemsize for shape, dtype in parameters.values()),
        **{name: value for name, value in facts.items() if value is not None},
        "files": {name: digest_file(directory / name) for name in list_files(directory, chunks="tensors" not in facts)},
    }
    manifest["sha256"] = _digest(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished model directory.

    Raises:
      UserError: there is none, a newer version made it, or it was changed.
    """
    file = directory / MANIFEST
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist.")
    if not file.is_file():
        raise UserError(f"{directory} is not a finished model directory: it has no {MANIFEST}. Make one with `maverick convert`.")
    manifest = read_json(file, advice="convert the checkpoint again")
    version = manifest.get("format")
    if version != FORMAT:
        raise UserError(f"{directory} has format {version}, this version reads format {FORMAT}: install a newer maverick-jax.")
    own = manifest.pop("sha256", None)
    if own is not None and own != _digest(manifest):
        raise UserError(f"{file} is damaged (its own digest is another): convert the checkpoint again.")
    if wrong := _find_wrong(manifest):  # only now: this is of somebody's making, and no accident
        raise UserError(f"{file} is damaged ({wrong} is not what it should be): convert the checkpoint again.")
    return manifest


def _find_wrong(manifest: dict[str, Any]) -> str | None:
    """The first entry of another type than `FORM` says, or with a name that leads out of the directory."""
    if wrong := next(_misfits(manifest, FORM, "it"), None):
        return wrong
    tensors = manifest.get("tensors", {})
    for name in (*tensors, *manifest.get("files", {})):
        if ".." in Path(name).parts or Path(name).is_absolute() or not name.isprintable() or (name in tensors and "/" in name):
            return f"the name {name!a}"
    for name, entry in tensors.items():
        sources = entry.get("from")
        if not isinstance(sources, dict if "digest" in entry else list) or not {"shape", "dtype"} <= entry.keys():
            return f"tensors.{name}"
        if isinstance(sources, dict) and not all(isinstance(digest, str) for digest in sources.values()):
            return f"tensors.{name}.from"
    return None


def _misfits(value: Any, form: Any, where: str) -> Iterator[str]:
    """What is of another type, by its place."""
    kind = form if isinstance(form, type) else type(form)
    if type(value) is not kind:
        yield where
    elif isinstance(form, list):
        for at, item in enumerate(value):
            yield from _misfits(item, form[0], f"{where}[{at}]")
    elif isinstance(form, dict):
        for name, item in value.items():
            if (inner := form.get(name, form.get(ANY))) is not None:
                yield from _misfits(item, inner, name if where == "it" else f"{where}.{name}")


def list_files(directory: Path, *, chunks: bool) -> list[str]:
    """Every file but the manifest and the journals; the chunks of arrays only on request, where no tensor has a digest."""
    found = []
    for folder, folders, files in os.walk(directory):
        here = Path(folder).relative_to(directory)
        if not chunks and "zarr.json" in files and "c" in folders:
            folders.remove("c")
        found += [str(here / name) for name in files if str(here / name) != MANIFEST and not fnmatch(name, NAME.format("*"))]
    return sorted(found)


def count_parameters(parameters: Mapping[str, tuple[Shape, np.dtype]]) -> int:
    """Weights, not bytes: a byte of two 4-bit values counts twice, scales not at all."""
    return sum(
        math.prod(shape) * (2 if name.endswith(".values") and dtype == np.uint8 else 1)
        for name, (shape, dtype) in parameters.items()
        if not name.endswith((".scales", "_scale"))  # ours and Hugging Face's
    )


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return None
