"""A model directory: `config.json`, tokenizer and template files, `manifest.json`, and the weights in `params/`."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maverick_jax.convert.names import Index, Shape
from maverick_jax.convert.orbax import flatten, quiet
from maverick_jax.convert.writer import array_spec
from maverick_jax.errors import UserError

PARAMS = "params"  # an Orbax checkpoint of its own
MANIFEST = "manifest.json"
FORMAT = 1
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


class ModelDirectory:
    """The parameters of a model directory; the same face as `HuggingFace`.

    Attributes:
      parameters: our name -> (shape, dtype).
    """

    def __init__(self, directory: Path):
        from orbax.checkpoint import v1 as ocp

        self.directory = directory
        with quiet():
            leaves = flatten(ocp.metadata(str(directory / PARAMS)).metadata)
        self.parameters: dict[str, tuple[Shape, np.dtype]] = {
            name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in leaves.items()
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a parameter."""
        import tensorstore

        return tensorstore.open(array_spec(self.directory / PARAMS, name), open=True).result()[index].read().result()


def open_model_directory(directory: str | Path) -> ModelDirectory:
    """Open a finished model directory.

    Raises:
      UserError: it is none, it is unfinished, or a newer version made it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist.")
    if not (directory / MANIFEST).is_file():
        raise UserError(f"{directory} is not a finished model directory: it has no {MANIFEST}. Make one with `maverick convert`.")
    try:
        version = json.loads((directory / MANIFEST).read_text())["format"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{directory / MANIFEST} is damaged ({error}): convert the checkpoint again.") from error
    if version != FORMAT:
        raise UserError(f"{directory} has format {version}, this version reads format {FORMAT}: install a newer maverick-jax.")
    try:
        return ModelDirectory(directory)
    except (ValueError, OSError) as error:
        raise UserError(f"{directory / PARAMS} cannot be read ({error}): convert the checkpoint again.") from error


def write_manifest(directory: Path, parameters: Mapping[str, tuple[Shape, np.dtype]], files: list[Path]) -> None:
    """The last file of a model directory: without it the directory is unfinished."""
    try:
        version = importlib.metadata.version("maverick-jax")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        version = None
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "maverick_jax": version,
        "parameters": sum(math.prod(shape) for shape, _ in parameters.values()),
        "bytes": sum(math.prod(shape) * dtype.itemsize for shape, dtype in parameters.values()),
        "source": {file.name: file.stat().st_size for file in files},
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def copy_companions(source: Path, destination: Path) -> None:
    """Copy what is there of config, tokenizer, template and licence files."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, destination / file.name)
