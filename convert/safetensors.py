"""Safetensors files without their library: it cannot read FP8, and its memory maps count as our memory.

A file is an 8-byte little-endian length, a JSON header of that length {name: {dtype, shape, data_offsets}}, and the
tensors' bytes in C order, one behind the other. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from maverick_jax.errors import UserError

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
MAX_HEADER = 100_000_000  # bytes; the limit of the library
SCRATCH = 1 << 20  # bytes read at once: small enough to stay in the processor's cache while we transpose it
KEEP_CACHED = 256 << 20  # bytes left in the page cache behind us: the two halves of an expert's gate|up are read in turn


class Tensor(NamedTuple):
    """A tensor in a file; `offset` is its first byte's, from the start of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


def read_header(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file, in the order of their bytes.

    Raises:
      UserError: unreadable, truncated, or not a safetensors file; nothing is assumed about a header that contradicts itself.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= MAX_HEADER:
                raise UserError(f"{file} is not a safetensors file: fetch it again.")
            text = stream.read(length)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    if len(text) < length:
        raise UserError(f"{file} ends {8 + length - size} bytes before its header does: the download is incomplete; fetch this file again.")
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = {name: _parse(file, name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} has a damaged header ({error}): fetch it again.") from error
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1].offset))
    _check_layout(file, tensors, 8 + length, size)
    return tensors


def _parse(file: Path, name: str, entry: Mapping[str, Any], start: int) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{file}: {name} has dtype {entry['dtype']}; {', '.join(DTYPES)} are supported.")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if any(type(n) is not int or n < 0 for n in (*shape, begin, end)) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: shape {list(shape)} of {entry['dtype']} does not take bytes {begin} to {end}")
    return Tensor(file, shape, dtype, start + begin)


def _check_layout(file: Path, tensors: Mapping[str, Tensor], start: int, size: int) -> None:
    """The tensors' bytes fill the file without gap or overlap."""
    end, last = start, "its header"
    for name, tensor in tensors.items():
        if tensor.offset != end:
            raise UserError(f"{file} has a damaged header ({name} does not begin where {last} ends): fetch it again.")
        end, last = end + math.prod(tensor.shape) * tensor.dtype.itemsize, name
    if size < end:
        raise UserError(f"{file} ends {end - size} bytes before `{last}` does: the download is incomplete; fetch this file again.")
    if size > end:
        raise UserError(f"{file} goes on for {size - end} bytes after its last tensor: fetch this file again.")


def make_header(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """Length and header of a file that holds tensors with these shapes and dtypes in this order."""
    spelling = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": spelling[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as the library does: the tensors begin on a multiple of 8
    return len(text).to_bytes(8, "little") + text


def read_box(file: Path, offset: int, shape: tuple[int, ...], box: tuple[slice, ...], out: np.ndarray) -> None:
    """Fill `out` with a box of an array that lies in C order at `offset`, and let go of the pages read long ago.

    Args:
      shape: of the array in the file; [E, D, 2, F], say.
      box: a range per axis.
      out: of the box's shape, any strides.
    """
    descriptor = os.open(file, os.O_RDONLY)
    try:
        _fill(descriptor, offset, shape, box, out, np.empty(max(SCRATCH, out.itemsize), np.uint8))
        behind = offset + box[0].start * math.prod(shape[1:]) * out.itemsize - KEEP_CACHED
        if behind > 0 and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, behind, os.POSIX_FADV_DONTNEED)
    except EOFError:
        raise UserError(f"{file} became shorter while it was read: fetch it again.") from None
    finally:
        os.close(descriptor)


def _fill(descriptor: int, offset: int, shape: tuple[int, ...], box: tuple[slice, ...], out: np.ndarray, scratch: np.ndarray) -> None:
    """Read whole rows into `scratch` and copy their part; rows that do not fit are arrays of their own."""
    row = math.prod(shape[1:]) * out.itemsize
    if row > len(scratch):
        for i in range(box[0].start, box[0].stop):
            _fill(descriptor, offset + i * row, shape[1:], box[1:], out[i - box[0].start], scratch)
        return
    rows = len(scratch) // row
    for at in range(box[0].start, box[0].stop, rows):
        count = min(rows, box[0].stop - at)
        block = scratch[: count * row]
        _read_exactly(descriptor, block, offset + at * row)
        out[at - box[0].start :][:count] = block.view(out.dtype).reshape(count, *shape[1:])[:, *box[1:]]


def _read_exactly(descriptor: int, block: np.ndarray, offset: int) -> None:
    rest = block.data
    while rest:
        count = os.preadv(descriptor, [rest], offset)
        if not count:
            raise EOFError
        rest, offset = rest[count:], offset + count
