"""Where a parameter lies in a stored tensor, from the spelling of the axes of both.

Parentheses merge axes and `+` joins tensors end to end, ours in brackets: "E D [F]+F" is the first half of the last axis, and
"(H d) D" against our "D H d" is torch's [out, in] matrix with its heads merged. An axis of ours that is not spelled has size 1: the
tensor belongs to one of its indices.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

BLOCK = 32 << 20  # bytes; larger where one row, such as an expert's matrix, is larger

Index = tuple[slice, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """A parameter, or a part of it, as it lies in a stored tensor.

    Attributes:
      shape: of the part, ours.
      origin: where the part begins in the whole parameter.
      stored_shape: of the whole stored tensor.
      file_shape: the same with no axes merged.
      order: our axis at each axis of `file_shape`.
      start: where the part begins on each axis of `file_shape`.
    """

    shape: Shape
    origin: Shape
    stored_shape: Shape
    file_shape: Shape
    order: Shape
    start: Shape

    @classmethod
    def of(
        cls,
        axes: str,
        shape: Shape,
        stored_axes: str,
        *,
        sizes: Mapping[str, int] | None = None,
        ranks: str = "",
        rank: int = 0,
        of: int = 1,
    ) -> Place:
        """The place of a parameter of this shape.

        Args:
          axes, stored_axes: spelling of ours and of the stored tensor's.
          sizes: of axes that are spelled in the stored tensor only.
          ranks: the axis that is divided among stored tensors, with all that is joined to it.
          rank, of: which one of how many this is.
        """
        ours = axes.split()
        size = {**(sizes or {}), **dict(zip(ours, shape, strict=True))}
        groups = [group.strip("()").split() for group in re.findall(r"\(.*?\)|\S+", stored_axes)]
        spelled = [token for group in groups for token in group]
        for joined in (re.findall(r"\w", token) for token in spelled):
            if ranks and ranks in joined:
                size |= {axis: size[axis] // of for axis in joined}
        tokens = [_Token.of(token, size) for token in spelled]
        absent = [axis for axis in ours if axis not in {token.axis for token in tokens}]
        size |= dict.fromkeys(absent, 1)
        tokens = [_Token(axis, 0, 1) for axis in absent] + tokens
        counts = iter([token.size for token in tokens[len(absent) :]])
        return cls(
            shape=tuple(size[axis] for axis in ours),
            origin=tuple(rank * size[axis] if axis == ranks else 0 for axis in ours),
            stored_shape=tuple(math.prod(next(counts) for _ in group) for group in groups),
            file_shape=tuple(token.size for token in tokens),
            order=tuple(ours.index(token.axis) for token in tokens),
            start=tuple(token.start for token in tokens),
        )

    def at(self, axis: int, index: int) -> Place:
        """The same place for another index of an axis of size 1."""
        return dataclasses.replace(self, origin=(*self.origin[:axis], index, *self.origin[axis + 1 :]))

    def box(self, index: Index) -> Index:
        """Our index, within the part, as ranges on the axes of `file_shape`."""
        ranges = [index[axis].indices(self.shape[axis])[:2] for axis in self.order]
        return tuple(slice(start + begin, start + end) for start, (begin, end) in zip(self.start, ranges, strict=True))

    def in_file_order(self, array: np.ndarray) -> np.ndarray:
        """A view of (a slice of) our array whose axes are those of `file_shape`."""
        return array.transpose(self.order)

    def whole(self, index: Index) -> Index:
        """Our index within the part as one into the whole parameter."""
        return tuple(slice(at + part.start, at + part.stop) for at, part in zip(self.origin, index, strict=True))

    def overlap(self, index: Index, shape: Shape) -> tuple[Index, Index] | None:
        """What a slice of the whole parameter has in common with the part: the ranges within the part and within the slice.

        Args:
          index: of the slice.
          shape: of the whole parameter.
        """
        inside, outside = [], []
        for part, size, at, length in zip(index, shape, self.origin, self.shape, strict=True):
            begin, end, _ = part.indices(size)
            first, last = max(begin, at), min(end, at + length)
            if first >= last:
                return None
            inside.append(slice(first - at, last - at))
            outside.append(slice(first - begin, last - begin))
        return tuple(inside), tuple(outside)

    def chunk_shape(self, itemsize: int) -> Shape:
        """Shape of the slices in which we read and write: whole rows of the stored tensor, `BLOCK` bytes or one row."""
        split, size = self.order[0], self.shape[self.order[0]]
        assert self.file_shape[0] == size, "no tensor of ours is joined to others on its first axis"
        pieces = min(size, -(-math.prod(self.shape) * itemsize // BLOCK))
        return tuple(-(-size // pieces) if axis == split else n for axis, n in enumerate(self.shape))


@dataclasses.dataclass(frozen=True)
class _Token:
    """One axis of `file_shape`: which axis of ours it is, where ours begins on it, and its whole size."""

    axis: str
    start: int
    size: int

    @classmethod
    def of(cls, token: str, size: Mapping[str, int]) -> _Token:
        joined = token.split("+")
        lengths = [size[part.strip("[]")] for part in joined]
        if len(joined) == 1:
            return cls(token, 0, lengths[0])
        ours = next(i for i, part in enumerate(joined) if part.startswith("["))
        return cls(joined[ours].strip("[]"), sum(lengths[:ours]), sum(lengths))


def chunk_indices(shape: Shape, chunk: Shape) -> list[Index]:
    """The index of every chunk, in C order."""
    ranges = ([slice(at, min(at + step, size)) for at in range(0, size, step)] for size, step in zip(shape, chunk, strict=True))
    return list(itertools.product(*ranges))
