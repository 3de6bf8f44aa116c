"""Tensors that lie in a file one behind the other, read by slices.

Not by memory map: pages of a map that were touched count as our memory, and there would be 800 GB of them.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maverick_jax.errors import UserError

SCRATCH = 1 << 20  # bytes read at once: small enough to stay in the processor's cache while we transpose it
LEAST_RUN = 1 << 12  # bytes; shorter runs are cheaper to copy out of the scratch
MOST_RUNS = 512  # in one call to the system, which takes up to 1024 buffers


class Tensor(NamedTuple):
    """A tensor in a file; `offset` is its first byte's, from the start of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_box(file: Path, offset: int, shape: tuple[int, ...], box: tuple[slice, ...], out: np.ndarray) -> None:
    """Fill `out` with a box of an array that lies in C order at `offset`.

    Args:
      shape: of the array in the file; [E, D, 2F], say.
      box: a range per axis.
      out: of the box's shape, any strides.
    """
    out = out.view(f"u{out.itemsize}")  # NumPy copies its own integers faster than bfloat16
    with _opened(file) as descriptor:
        _fill(descriptor, offset, shape, box, out, np.empty(max(SCRATCH, out.itemsize), np.uint8))


def read_bytes(file: Path, offset: int, out: memoryview) -> None:
    """Fill `out` with the bytes from `offset` on."""
    with _opened(file) as descriptor:
        _read_exactly(descriptor, [out], offset)


def forget(file: Path, begin: int, end: int) -> None:
    """Let the system drop a part of a file from its cache: nobody reads it again soon."""
    if begin < end and hasattr(os, "posix_fadvise"):  # an end of 0 would be that of the file
        with _opened(file) as descriptor:
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[int]:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        yield descriptor
    except EOFError:
        raise UserError(f"{file} became shorter while it was read: fetch it again.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    finally:
        os.close(descriptor)


def _fill(descriptor: int, offset: int, shape: tuple[int, ...], box: tuple[slice, ...], out: np.ndarray, scratch: np.ndarray) -> None:
    """Read whole rows and copy their part; rows that do not fit into `scratch` are arrays of their own."""
    row = math.prod(shape[1:]) * out.itemsize
    first, count = box[0].start, box[0].stop - box[0].start
    if out.flags.c_contiguous and row * count and out.nbytes == row * count:
        _read_exactly(descriptor, [out.reshape(-1).view(np.uint8).data], offset + first * row)
    elif len(shape) == 2 and out[0].flags.c_contiguous and out[0].nbytes >= LEAST_RUN:
        _read_runs(descriptor, offset + first * row, row, box[1].start * out.itemsize, out, scratch)
    elif row > len(scratch):
        for i in range(count):
            _fill(descriptor, offset + (first + i) * row, shape[1:], box[1:], out[i], scratch)
    else:
        rows = len(scratch) // row
        for at in range(0, count, rows):
            some = out[at : at + rows]
            block = scratch[: len(some) * row]
            _read_exactly(descriptor, [block.data], offset + (first + at) * row)
            some[...] = block.view(out.dtype).reshape(len(some), *shape[1:])[:, *box[1:]]


def _read_runs(descriptor: int, offset: int, row: int, skip: int, out: np.ndarray, scratch: np.ndarray) -> None:
    """The same part of every row, each straight into its place; what is between them goes to `scratch` and is overwritten."""
    gap = scratch[: row - out[0].nbytes].data if row - out[0].nbytes <= len(scratch) else np.empty(row - out[0].nbytes, np.uint8).data
    for at in range(0, len(out), MOST_RUNS):
        buffers = []
        for run in out[at : at + MOST_RUNS]:
            buffers += [run.view(np.uint8).data, gap]
        # The last row's gap is not read: it may lie behind the end of the file.
        _read_exactly(descriptor, buffers[:-1], offset + at * row + skip)


def _read_exactly(descriptor: int, buffers: list[memoryview], offset: int) -> None:
    buffers = [buffer for buffer in buffers if buffer.nbytes]
    while buffers:
        count = os.preadv(descriptor, buffers, offset)
        if not count:
            raise EOFError
        offset += count
        while buffers and count >= buffers[0].nbytes:
            count -= buffers.pop(0).nbytes
        if count:
            buffers[0] = buffers[0][count:]
