"""A checkpoint as a source of our parameters, read slice by slice, whatever the format of its files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from maverick_jax.config import Config
from maverick_jax.convert.formats.places import Index, Place, Shape
from maverick_jax.convert.formats.tensor_file import Tensor, read_box
from maverick_jax.errors import UserError

WEIGHTS = tuple(map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float32, ml_dtypes.float8_e4m3fn)))


class Piece(NamedTuple):
    """A part of a parameter, or all of it, in one stored tensor."""

    stored: str
    tensor: Tensor
    place: Place


class Source:
    """The parameters of a checkpoint of PyTorch.

    Attributes:
      directory: where its files are.
      kind: what it is, in words.
      config: the model's.
      pieces: our name -> where its parts are.
      parameters: our name -> (shape, dtype as stored), in the model's order.
      notes: what its owner may want to know, a sentence each, such as what was passed over.
      known: digests of stored tensors that need not be taken; files of PyTorch have none.
    """

    known: Mapping[str, str] = {}

    def __init__(self, directory: Path, kind: str, config: Config, pieces: Mapping[str, list[Piece]], notes: Sequence[str] = ()):
        self.directory, self.kind, self.config, self.pieces, self.notes = directory, kind, config, dict(pieces), tuple(notes)
        for name, parts in self.pieces.items():
            _check(name, parts)
        self.parameters: dict[str, tuple[Shape, np.dtype]] = {
            name: (_shape(parts), parts[0].tensor.dtype) for name, parts in pieces.items()
        }

    @property
    def tensors(self) -> dict[tuple[Path, str], Tensor]:
        """Every stored tensor, by file and name."""
        return {(piece.tensor.file, piece.stored): piece.tensor for parts in self.pieces.values() for piece in parts}

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        return sorted({file for file, _ in self.tensors})

    def made_from(self, name: str) -> list[tuple[Path, str]]:
        """File and name of each stored tensor that holds a part of a parameter."""
        return [(piece.tensor.file, piece.stored) for piece in self.pieces[name]]

    def stored_in(self, file: Path) -> dict[str, Tensor]:
        """The tensors in one of the files."""
        return {name: tensor for (home, name), tensor in self.tensors.items() if home == file}

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a parameter, reading little more than its own bytes.

        Args:
          name: ours.
          index: a slice without step per axis of ours, as `jax.make_array_from_callback` passes.
        """
        shape, dtype = self.parameters[name]
        out = np.empty([len(range(size)[part]) for size, part in zip(shape, index, strict=True)], dtype)
        for piece, inside, outside in self._overlaps(name, index):
            place = piece.place
            read_box(piece.tensor.file, piece.tensor.offset, place.file_shape, place.box(inside), place.in_file_order(out[outside]))
        return out

    def spans(self, name: str, index: Index) -> list[tuple[Path, int, int]]:
        """The file, first byte and end of every range that `read` looks into."""
        found = []
        for piece, inside, _ in self._overlaps(name, index):
            rows = piece.place.box(inside)[0]
            row = math.prod(piece.place.file_shape[1:]) * piece.tensor.dtype.itemsize
            found.append((piece.tensor.file, piece.tensor.offset + rows.start * row, piece.tensor.offset + rows.stop * row))
        return found

    def _overlaps(self, name: str, index: Index) -> Iterator[tuple[Piece, Index, Index]]:
        for piece in self.pieces[name]:
            if (common := piece.place.overlap(index, self.parameters[name][0])) is not None:
                yield piece, *common


def _shape(parts: list[Piece]) -> Shape:
    ends = [[at + size for at, size in zip(part.place.origin, part.place.shape, strict=True)] for part in parts]
    return tuple(map(max, zip(*ends, strict=True)))


def _check(name: str, parts: list[Piece]) -> None:
    for part in parts:
        tensor, expected = part.tensor, part.place.stored_shape
        if tensor.dtype not in WEIGHTS:
            raise UserError(f"{tensor.file}: {part.stored} has dtype {tensor.dtype}; {', '.join(map(str, WEIGHTS))} are supported.")
        if _without_ones(tensor.shape) != _without_ones(expected):
            raise UserError(f"{tensor.file}: {part.stored} has shape {list(tensor.shape)}, the model's config asks for {list(expected)}.")
        if tensor.dtype != parts[0].tensor.dtype:
            raise UserError(
                f"{tensor.file}: {part.stored} is {tensor.dtype}, other parts of {name} are {parts[0].tensor.dtype}: fetch the files again."
            )


def _without_ones(shape: Shape) -> list[int]:
    return [size for size in shape if size != 1]
