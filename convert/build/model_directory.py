"""A model directory: `config.json`, tokenizer and template files, `manifest.json`, and the weights in `params/`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maverick_jax.config import Config
from maverick_jax.convert.build.manifest import read_manifest
from maverick_jax.convert.build.orbax import flatten, quiet
from maverick_jax.convert.build.remote import STORE
from maverick_jax.convert.build.writer import array_path, array_spec
from maverick_jax.convert.formats.agreement import compare_layers
from maverick_jax.convert.formats.companions import MANIFEST, PARAMS
from maverick_jax.convert.formats.foreign import check_directory, refuse_foreign
from maverick_jax.convert.formats.places import Index, Shape
from maverick_jax.errors import UserError
from maverick_jax.json_file import read_json

LONGEST_ADDRESS = 2000
SAME = (("shape", "shape"), ("data_type", "dtype"))  # Zarr's names and the manifest's

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
        self.params = _address(directory / PARAMS) if (directory / PARAMS).is_file() else str(directory / PARAMS)
        self._arrays: dict[str, Any] = {}
        self._check_descriptions()
        with quiet():
            leaves = flatten(ocp.metadata(self.params).metadata)
        if lost := [name for name, leaf in leaves.items() if leaf is None]:
            raise ValueError(f"{lost[0]} has no array")
        self.parameters: dict[str, tuple[Shape, np.dtype]] = {
            name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in leaves.items()
        }
        compare_layers(directory, self.config, self.parameters, LAYERS)
        if astray := sorted(manifest.get("tensors", self.parameters).keys() ^ self.parameters.keys()):
            raise ValueError(f"{astray[0]} is in {MANIFEST} or there, and not in both")

    def _check_descriptions(self) -> None:
        """Before Orbax opens all arrays at once, and leaves behind what it began when one is lost or damaged."""
        if "://" in self.params:
            return
        folder, advice = self.directory / PARAMS, "convert the checkpoint again"
        for file in (folder / "_CHECKPOINT_METADATA", array_path(folder, "_METADATA")):
            read_json(file, advice=advice)
        tensors = self.manifest.get("tensors", {})
        for name in tensors.keys() | {file.parent.name for file in array_path(folder, "*").parent.glob("*/zarr.json")}:
            file = array_path(folder, name) / "zarr.json"
            if not file.is_file():
                raise ValueError(f"{name} has no array")
            found = read_json(file, advice=advice)
            if name in tensors and any(found.get(theirs) != tensors[name][ours] for theirs, ours in SAME):
                raise UserError(f"{file} is damaged ({MANIFEST} has another shape or dtype): {advice}.")
            self._array(name)

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a parameter.

        Raises:
          UserError: a chunk is lost or damaged.
        """
        array = self._array(name)
        try:
            return array[index].read().result()
        except ValueError as error:
            raise self._unreadable(name, error) from error

    def check_chunks(self) -> None:
        """Refuse a converted directory on a disk if files are missing or cut short: it was copied in part.

        Raises:
          UserError: names the first.
        """
        for name in self.manifest.get("tensors", {}) if "://" not in self.params else ():
            size = math.prod(self.chunk_shape(name)) * self.parameters[name][1].itemsize
            for file in self.chunk_files(name):
                if not file.is_file() or file.stat().st_size != size:
                    raise UserError(f"{file}, a part of {name}, is missing or cut short: copy or convert the checkpoint again.")
                if not os.access(file, os.R_OK):
                    raise UserError(f"{file}, a part of {name}, cannot be read (Permission denied): give yourself the right to.")

    def chunk_files(self, name: str) -> Iterator[Path]:
        """The file of every chunk of a parameter, in C order; one by one, for a stranger may have said that there are a billion."""
        return (self.chunk_file(name, cell) for cell in _cells(self.chunk_counts(name)))

    def files(self) -> list[Path]:
        """All files of the weights."""
        return sorted(file for file in (self.directory / PARAMS).rglob("*") if file.is_file())

    def chunk_file(self, name: str, cell: Sequence[int]) -> Path:
        """The file of the chunk in this place on the grid."""
        return array_path(self.directory / PARAMS, name).joinpath("c", *map(str, cell))

    def chunk_shape(self, name: str) -> Shape:
        return tuple(self._array(name).chunk_layout.read_chunk.shape)

    def chunk_counts(self, name: str) -> list[int]:
        """How many chunks there are along each axis."""
        return [-(-size // step) for size, step in zip(self.parameters[name][0], self.chunk_shape(name), strict=True)]

    def nbytes(self, name: str) -> int:
        shape, dtype = self.parameters[name]
        return math.prod(shape) * dtype.itemsize

    def _array(self, name: str) -> Any:
        """Opened once, for each opening reads the array's description."""
        import tensorstore

        if name not in self._arrays:
            try:
                self._arrays[name] = tensorstore.open(array_spec(self.params, name), open=True).result()
            except ValueError as error:
                raise self._unreadable(name, error) from error
        return self._arrays[name]

    def _unreadable(self, name: str, error: ValueError) -> UserError:
        return UserError(f"{self.params}: {name} cannot be read ({error}): copy or convert the checkpoint again.")


def _cells(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All indices of a grid, in C order; unlike `itertools.product` it makes none before it is asked for."""
    if not counts:
        yield ()
        return
    for first in range(counts[0]):
        for rest in _cells(counts[1:]):
            yield first, *rest


def _address(file: Path) -> str:
    """What a file in the place of the folder of weights says, where they are."""
    with open(file, "rb") as stream:
        address = stream.read(LONGEST_ADDRESS + 1).decode(errors="replace").strip()
    if not address.startswith(STORE) or len(address) > LONGEST_ADDRESS or not address.isprintable():
        raise UserError(f"{file} is a file and holds no address {STORE}…: copy or convert the checkpoint again.")
    return address


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
    except Exception as error:  # Orbax meets bytes that it does not expect with many kinds
        raise UserError(f"{directory / PARAMS} cannot be read ({error}): convert the checkpoint again.") from error


def recognize_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of what should be a finished model directory.

    Raises:
      UserError: it is none, and what it is instead if that can be seen.
    """
    check_directory(directory)
    if (directory / PARAMS).is_dir():
        check_directory(directory / PARAMS)
    if not (directory / MANIFEST).is_file():
        looks = refuse_foreign(directory)
        if looks.has_weights and not looks.has(PARAMS):
            raise UserError(f"{directory} is a checkpoint of PyTorch, and no model directory: `maverick convert` makes one of it.")
    return read_manifest(directory)
