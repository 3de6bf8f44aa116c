"""A model directory to be read again: exported, or quantized without the checkpoint that it was made from.

Every chunk is digested as it is read, and when the last of a tensor's chunks has come, they are held against the manifest.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maverick_jax.convert.build.building import SpoiltError
from maverick_jax.convert.build.digest import digest_array, digest_chunks, digest_file, digest_text
from maverick_jax.convert.build.manifest import read_manifest
from maverick_jax.convert.build.model_directory import ModelDirectory, open_model_directory
from maverick_jax.convert.build.writer import array_path
from maverick_jax.convert.formats.companions import MANIFEST, PARAMS
from maverick_jax.convert.formats.places import Index, Shape
from maverick_jax.convert.formats.recognize import find_directory, local_path, open_source
from maverick_jax.convert.formats.source import Source
from maverick_jax.convert.formats.tensor_file import Tensor, read_bytes
from maverick_jax.errors import UserError

CURE = "copy it again, or convert the checkpoint again."
Cell = tuple[int, ...]  # which chunk, on the grid of a tensor's


class ModelSource:
    """The parameters of a model directory, with the face of a `Source`.

    Attributes:
      directory, config, parameters: as a source's.
      kind: what it is, in words.
      files: the manifest, whose digests stand for all that is read.
      known: parameter -> digest, by the manifest.
      notes: that nothing can be checked, where the directory was made without digests.
    """

    def __init__(self, model: ModelDirectory):
        self.model, self.directory, self.config, self.parameters = model, model.directory, model.config, model.parameters
        made_from = model.manifest.get("kind")
        self.kind = f"model directory of {made_from}" if made_from else "model directory"
        self.files = [self.directory / MANIFEST]
        tensors = model.manifest.get("tensors", {})
        self.known: dict[str, str] = {name: entry["digest"] for name, entry in tensors.items() if "digest" in entry}
        self.notes = _note_unchecked(self.directory, model.manifest)
        self._found: dict[str, dict[Cell, str]] = {name: {} for name in self.known}
        self._right: set[str] = set()
        self._lock = threading.Lock()

    def check_files(self) -> None:
        """Take the digests of the files of weights that the manifest has one by one: descriptions of arrays, and where a model was
        saved and not converted, all.

        Raises:
          UserError: one is not what was written.
        """
        for name, digest in self.model.manifest.get("files", {}).items():
            file = self.directory / name
            if Path(name).parts[0] == PARAMS and not (file.is_file() and digest_file(file) == digest):
                raise UserError(f"{file} is missing, or not what was written: {CURE}")

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a parameter, out of whole chunks.

        Raises:
          UserError: a chunk is lost, or the tensor is not what was written.
        """
        if name not in self.known:
            return self.model.read(name, index)
        shape, dtype = self.parameters[name]
        chunk = self.model.chunk_shape(name)
        ends = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        out = np.empty([end - begin for begin, end in ends], dtype)
        cells = [*itertools.product(*(range(begin // step, -(-end // step)) for (begin, end), step in zip(ends, chunk, strict=True)))]
        for cell in cells:
            common = [
                (max(begin, at * step), min(end, at * step + step), begin, at * step)
                for (begin, end), at, step in zip(ends, cell, chunk, strict=True)
            ]
            outside = tuple(slice(first - begin, last - begin) for first, last, begin, _ in common)
            inside = tuple(slice(first - start, last - start) for first, last, _, start in common)
            values = self._read_chunk(name, cell, chunk, dtype)[inside]
            if len(cells) == 1:
                return values
            out[outside] = values
        return out

    def _read_chunk(self, name: str, cell: Cell, chunk: Shape, dtype: np.dtype) -> np.ndarray:
        values, file = np.empty(chunk, dtype), self.model.chunk_file(name, cell)
        read_bytes(file, 0, values.reshape(-1).view(np.uint8).data)
        digest = digest_array(values)
        with self._lock:
            found = self._found[name]
            same = found.setdefault(cell, digest) == digest
            if same and name not in self._right and len(found) == math.prod(self.model.chunk_counts(name)):
                same = digest_chunks(found[at] for at in sorted(found)) == self.known[name]
                self._right.add(name)
        if not same:
            folder = array_path(self.directory / PARAMS, name)
            raise SpoiltError(f"{name} is not what was written, {folder} has changed: {CURE}")
        return values

    def check_rest(self, names: Iterable[str]) -> None:
        """Read what has not been read of these parameters, so that all of it is held against the manifest.

        Raises:
          UserError: as `read`.
        """
        for name in self.known.keys() & set(names) - self._right:
            chunk, dtype = self.model.chunk_shape(name), self.parameters[name][1]
            for cell in itertools.product(*map(range, self.model.chunk_counts(name))):
                if cell not in self._found[name]:
                    self._read_chunk(name, cell, chunk, dtype)

    def spans(self, name: str, index: Index) -> list[tuple[Path, int, int]]:
        """Where the slice lies, in the order in which parameters are read; the numbers are no bytes of one file."""
        first = index[0] if index else slice(0, 1)
        return [(array_path(self.directory / PARAMS, name), first.start, first.stop)]

    def made_from(self, name: str) -> list[tuple[Path, str]]:
        """The file and name by which a parameter's digest is known."""
        return [(self.files[0], name)]

    def stored_in(self, file: Path) -> dict[str, Tensor]:
        """No tensor lies in the manifest."""
        return {}

    def stamp(self) -> str:
        """Another text when any file of the weights has been written anew."""
        stats = (file.stat() for file in self.model.files())
        return digest_text(" ".join(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats))

    def provenance(self) -> dict[str, Any]:
        """What the manifest of something made from this directory says about it."""
        kept = ("kind", "source", "target", "quantize", "before")
        manifest: Mapping[str, Any] = self.model.manifest
        return {"directory": self.directory.resolve().name, **{name: manifest[name] for name in kept if name in manifest}}


def note_unchecked(directory: str | Path) -> tuple[str, ...]:
    """That the weights of a model directory cannot be checked, if it was made without digests."""
    return _note_unchecked(local_path(directory), read_manifest(local_path(directory)))


def _note_unchecked(directory: Path, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    tensors = manifest.get("tensors", {}).values()
    if not tensors or any("digest" in entry for entry in tensors):
        return ()
    return (f"{directory} was made without digests: its weights were read unchecked.",)


def open_model_source(directory: str | Path) -> ModelSource:
    """Open a finished model directory to be read again.

    Raises:
      UserError: as `open_model_directory`; or a chunk is missing or cut short.
    """
    model = open_model_directory(directory)
    model.check_chunks()
    return ModelSource(model)


def open_origin(path: str | Path, target: str | None) -> Source | ModelSource:
    """What is converted: a PyTorch checkpoint, or a model directory if it is to become another format.

    Raises:
      UserError: as `open_source`; or a model directory that would become what it is.
    """
    directory = find_directory(path)
    if target is not None and (directory / MANIFEST).is_file() and (directory / PARAMS).is_dir():
        return open_model_source(directory)
    return open_source(directory)
