"""The seam through which every converter writes: slices in any order become an Orbax checkpoint.

Orbax itself saves whole leaves, and one expert stack of Maverick is 21 GB. So Orbax saves a skeleton with one element per
leaf, each leaf's array is made anew at its real size, and TensorStore fills it chunk by chunk. The result is an ordinary
Orbax checkpoint, without OCDBT and with Zarr 3 arrays; chunks are uncompressed, for bfloat16 weights do not compress.
"""

from __future__ import annotations

import collections
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maverick_jax.convert import orbax
from maverick_jax.convert.names import Index, Shape

IN_FLIGHT = 64 << 20  # bytes being written while the next are read, or one chunk: the bound on our memory


class Writer:
    """Fills an Orbax checkpoint slice by slice.

    A chunk's file appears under its name only when all of it is on disk (TensorStore writes beside, syncs and renames), so
    a chunk that is there is complete, whatever became of the process that wrote it.

    Args:
      path: of the checkpoint; made if it is not there, continued if it is.
      parameters: dotted name -> (shape, dtype).
      chunks: dotted name -> shape of its chunks.
    """

    def __init__(self, path: Path, parameters: Mapping[str, tuple[Shape, np.dtype]], chunks: Mapping[str, Shape]):
        if not path.exists():
            _save_skeleton(path, parameters)
        self.path = path
        self.chunks = chunks
        self._arrays = {name: _open(path, name, shape, dtype, chunks[name]) for name, (shape, dtype) in parameters.items()}
        self._writing: collections.deque[tuple[Any, int]] = collections.deque()

    def write(self, name: str, index: Index, values: np.ndarray) -> None:
        """Begin to write a slice that covers whole chunks. `values` must not change any more.

        Raises:
          Whatever went wrong with this or an earlier slice.
        """
        while self._writing and values.nbytes + sum(size for _, size in self._writing) > IN_FLIGHT:
            self._wait()
        future = self._arrays[name][index].write(values, can_reference_source_data_indefinitely=True)
        self._writing.append((future, values.nbytes))

    def has(self, name: str, index: Index) -> bool:
        """Whether the chunk at `index` is complete."""
        return self._chunk_file(name, index).exists()

    def close(self) -> None:
        """Wait until everything is on disk."""
        while self._writing:
            self._wait()

    def _wait(self) -> None:
        future, _ = self._writing.popleft()
        future.result()

    def _chunk_file(self, name: str, index: Index) -> Path:
        cell = (str(part.start // size) for part, size in zip(index, self.chunks[name], strict=True))
        return array_path(self.path, name).joinpath("c", *cell)


def array_path(path: Path, name: str) -> Path:
    """Directory of one parameter's Zarr array in an Orbax checkpoint."""
    return path / "state" / name


def array_spec(path: Path, name: str) -> dict[str, Any]:
    """TensorStore's description of one parameter's array."""
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{array_path(path, name)}/"}}


def _open(path: Path, name: str, shape: Shape, dtype: np.dtype, chunk: Shape) -> Any:
    """The array: the one that is there if it is of this shape, else a new one in its place."""
    import tensorstore

    spec = array_spec(path, name) | {
        "metadata": {
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "fill_value": 0.0,
        },
        "store_data_equal_to_fill_value": True,  # or chunks of zeros would look missing
    }
    try:
        return tensorstore.open(spec, open=True).result()
    except ValueError:
        return tensorstore.open(spec, create=True, delete_existing=True).result()


def _save_skeleton(path: Path, parameters: Mapping[str, tuple[Shape, np.dtype]]) -> None:
    for stale in path.parent.glob(f"{path.name}.orbax-checkpoint-tmp*"):  # of an attempt that was killed
        shutil.rmtree(stale)
    orbax.save(path, {name: np.zeros(1, dtype) for name, (_, dtype) in parameters.items()})
