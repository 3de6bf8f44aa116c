"""A model directory: `config.json`, tokenizer and template files, `manifest.json`, and the weights in `params/`."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from maverick_jax.config import Config
from maverick_jax.convert.agreement import compare_layers
from maverick_jax.convert.companions import PARAMS
from maverick_jax.convert.foreign import refuse_foreign
from maverick_jax.convert.manifest import MANIFEST, read_manifest
from maverick_jax.convert.orbax import flatten, quiet
from maverick_jax.convert.places import Index, Shape
from maverick_jax.convert.writer import array_path, array_spec
from maverick_jax.errors import UserError

LAYERS = ("text.layers.{i}.", "vision.layers.{i}.")


class ModelDirectory:
    """The parameters of a model directory; the same face as `Source`.

    Attributes:
      manifest: of the directory.
      config: the model's.
      params: where the Orbax checkpoint is, a folder or an address.
      parameters: our name -> (shape, dtype).
      notes: as a source's; there is nothing to tell.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        from orbax.checkpoint import v1 as ocp

        self.directory, self.manifest, self.config = directory, manifest, Config.from_directory(directory)
        self.params = str(directory / PARAMS)
        if (directory / PARAMS).is_file():
            self.params = (directory / PARAMS).read_text().strip()
        self._arrays: dict[str, Any] = {}
        self._check_arrays()
        with quiet():
            leaves = flatten(ocp.metadata(self.params).metadata)
        if lost := [name for name, leaf in leaves.items() if leaf is None]:
            raise ValueError(f"{lost[0]} has no array")
        self.parameters: dict[str, tuple[Shape, np.dtype]] = {
            name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in leaves.items()
        }
        compare_layers(directory, self.config, self.parameters, LAYERS)

    def _check_arrays(self) -> None:
        """Before Orbax opens them all at once, and leaves behind what it began when one is lost."""
        for name in self.manifest.get("tensors", {}):
            if "://" not in self.params and not (array_path(self.directory / PARAMS, name) / "zarr.json").is_file():
                raise ValueError(f"{name} has no array")

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a parameter.

        Raises:
          UserError: a chunk is lost or damaged.
        """
        try:
            return self._array(name)[index].read().result()
        except ValueError as error:
            raise UserError(f"{self.params}: {name} cannot be read ({error}): copy or convert the checkpoint again.") from error

    def check_chunks(self) -> None:
        """Refuse a converted directory on a disk if files are missing or cut short: it was copied in part.

        Raises:
          UserError: names the first.
        """
        for name in self.manifest.get("tensors", {}) if "://" not in self.params else ():
            size = math.prod(self._array(name).chunk_layout.read_chunk.shape) * self.parameters[name][1].itemsize
            for file in self.chunk_files(name):
                if not file.is_file() or file.stat().st_size != size:
                    raise UserError(f"{file}, a part of {name}, is missing or cut short: copy or convert the checkpoint again.")

    def chunk_files(self, name: str) -> list[Path]:
        """The file of every chunk of a parameter, in C order."""
        shape, chunk = self.parameters[name][0], self._array(name).chunk_layout.read_chunk.shape
        cells = itertools.product(*(range(-(-size // step)) for size, step in zip(shape, chunk, strict=True)))
        return [array_path(self.directory / PARAMS, name).joinpath("c", *map(str, cell)) for cell in cells]

    def nbytes(self, name: str) -> int:
        shape, dtype = self.parameters[name]
        return math.prod(shape) * dtype.itemsize

    def _array(self, name: str) -> Any:
        """Opened once, for each opening reads the array's description."""
        import tensorstore

        if name not in self._arrays:
            self._arrays[name] = tensorstore.open(array_spec(self.params, name), open=True).result()
        return self._arrays[name]


def open_model_directory(directory: str | Path) -> ModelDirectory:
    """Open a finished model directory.

    Raises:
      UserError: it is none, it is unfinished, or a newer version made it.
    """
    directory = Path(directory)
    manifest = recognize_manifest(directory)
    try:
        return ModelDirectory(directory, manifest)
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"{directory / PARAMS} cannot be read ({error}): convert the checkpoint again.") from error


def recognize_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of what should be a finished model directory.

    Raises:
      UserError: it is none, and what it is instead if that can be seen.
    """
    if not (directory / MANIFEST).is_file():
        refuse_foreign(directory)
    return read_manifest(directory)
