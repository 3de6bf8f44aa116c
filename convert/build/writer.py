"""The seam through which every converter writes: slices in any order become an Orbax checkpoint.

Orbax itself saves whole leaves, and one expert stack of Maverick is 21 GB. So Orbax saves a skeleton with one element per
leaf, each leaf's array is made anew at its real size by TensorStore, and filled chunk by chunk. The result is an ordinary
Orbax checkpoint, without OCDBT and with Zarr 3 arrays; chunks are uncompressed, for bfloat16 weights do not compress.
"""

from __future__ import annotations

import math
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maverick_jax.convert.build import orbax
from maverick_jax.convert.build.durable import sync
from maverick_jax.convert.formats.places import Index, Shape
from maverick_jax.sharding import multihost

BESIDE = "writing"  # folder of chunks that are being written
SKELETON = "skeleton"  # the checkpoint that Orbax makes, with an element per leaf
WRITTEN_AT_ONCE = 8 << 20  # bytes


class Leaf(NamedTuple):
    """A parameter that is written."""

    shape: Shape
    dtype: np.dtype
    chunk: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Writer:
    """Fills an Orbax checkpoint slice by slice; any thread of any process may write.

    A chunk of a Zarr array without compression is a file of its bytes. It is written beside the checkpoint, synced and renamed,
    so it appears under its name only when all of it is on disk; the name may be lost in a power cut, and then it is written again.
    (TensorStore writes the same file, but copies each chunk into many small blocks, of which its threads kept half a gigabyte.)

    Args:
      path: of the checkpoint; made by all processes of the run if it is not there, continued if it is.
      leaves: what it holds, by dotted name.
    """

    def __init__(self, path: Path, leaves: Mapping[str, Leaf]):
        if not multihost.exchange(path.exists())[0]:
            _save_skeleton(path, leaves)
        self._path, self._leaves, self._beside = path, leaves, path.with_name(BESIDE)
        if multihost.is_first():
            for name, leaf in leaves.items():
                _make_array(path, name, leaf)
            self._beside.mkdir(exist_ok=True)
        multihost.exchange("made")

    def write(self, name: str, index: Index, values: np.ndarray) -> np.ndarray:
        """Write one chunk; it is on disk when this returns.

        Returns:
          What the chunk's file holds: the values, filled up with zeros at the array's edge.
        """
        chunk = self._leaves[name].chunk
        if values.shape != chunk:
            inside, values = values, np.zeros(chunk, values.dtype)
            values[tuple(slice(size) for size in inside.shape)] = inside
        values = np.ascontiguousarray(values)
        file, beside = self.chunk_file(name, index), self._beside / uuid.uuid4().hex
        with beside.open("wb", buffering=0) as stream:
            rest = values.reshape(-1).view(np.uint8).data
            while rest:
                rest = rest[stream.write(rest[:WRITTEN_AT_ONCE]) :]
            os.fsync(stream.fileno())
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.rename(file)
        return values

    def chunk_file(self, name: str, index: Index) -> Path:
        """The file of the chunk at `index`."""
        cell = (str(part.start // size) for part, size in zip(index, self._leaves[name].chunk, strict=True))
        return array_path(self._path, name).joinpath("c", *cell)

    def close(self) -> None:
        """Remove what interrupted attempts left beside the checkpoint, and its times: here, for each attempt comes by."""
        shutil.rmtree(self._beside)
        orbax.forget_occasion(self._path)


def array_path(path: Path, name: str) -> Path:
    """Directory of one parameter's Zarr array in an Orbax checkpoint."""
    return path / "state" / name


def array_spec(path: Path | str, name: str) -> dict[str, Any]:
    """TensorStore's description of one parameter's array; `path` may be an address in an object store."""
    folder = f"{path}/state/{name}/"
    kvstore = folder if "://" in folder else {"driver": "file", "path": folder}
    return {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}  # a chunk that is lost is no zeros


def _make_array(path: Path, name: str, leaf: Leaf) -> None:
    """The array's metadata: what is there if it is of this shape, else a new array in its place."""
    import tensorstore

    spec = array_spec(path, name) | {
        "metadata": {
            "shape": leaf.shape,
            "data_type": leaf.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": leaf.chunk}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "fill_value": 0.0,
        },
    }
    try:
        tensorstore.open(spec, open=True).result()
    except ValueError:
        tensorstore.open(spec, create=True, delete_existing=True).result()


def _save_skeleton(path: Path, leaves: Mapping[str, Leaf]) -> None:
    """Under another name until it is on the disk, for a later attempt takes for whole what is there; but for the arrays, which are
    looked at each time."""
    beside = path.with_name(SKELETON)
    if multihost.is_first():
        for stale in path.parent.glob(f"{SKELETON}*"):  # of an attempt that was killed
            shutil.rmtree(stale)
    multihost.exchange("clean")
    orbax.save(beside, {name: np.zeros(1, leaf.dtype) for name, leaf in leaves.items()})
    if multihost.is_first():
        for folder in (array_path(beside, ""), beside):
            for file in filter(Path.is_file, folder.iterdir()):
                sync(file)
            sync(folder)
        beside.rename(path)
