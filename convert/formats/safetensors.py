"""Headers of safetensors files, without their library, which cannot read FP8.

A file is an 8-byte little-endian length, a JSON header of that length {name: {dtype, shape, data_offsets}}, and the
tensors' bytes in C order, one behind the other. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import collections
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maverick_jax import stand_ins
from maverick_jax.convert.formats.tensor_file import Tensor
from maverick_jax.errors import UserError
from maverick_jax.json_file import MAX_BYTES, parse_json

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
OTHERS = {  # of buffers that lie beside the weights
    "F64": np.dtype(np.float64),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
}
LARGEST, MOST_AXES = 1 << 63, 8
LIBRARY_LIMIT = 100_000_000  # bytes of a header; what says it has more is another kind of file


def read_header(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file, in the order of their bytes.

    Raises:
      UserError: unreadable, truncated, or not a safetensors file; nothing is assumed about a header that contradicts itself.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            begin = stream.read(stand_ins.ENOUGH)
            if (instead := stand_ins.explain_text(begin)) is not None:
                raise UserError(f"{file} {instead}")
            length = int.from_bytes(begin[:8], "little")
            if not 2 <= length <= LIBRARY_LIMIT:
                raise UserError(f"{file} is not a safetensors file: fetch it again.")
            if length > MAX_BYTES:
                raise UserError(f"{file} has a header of {length:,} bytes, more than the {MAX_BYTES:,} of 100,000 tensors: fetch it again.")
            if missing := max(0, 8 + length - size):
                raise UserError(f"{file} ends {missing} bytes before its header does: the download is incomplete; fetch this file again.")
            stream.seek(8)
            text = stream.read(length)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        entries = parse_json(text, pairs=_without_duplicates)
        entries.pop("__metadata__", None)
        tensors = {name: _parse(file, name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} has a damaged header ({error}): fetch it again.") from error
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1].offset))
    _check_layout(file, tensors, 8 + length, size)
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name} appears twice")
    return found


def _parse(file: Path, name: str, entry: Mapping[str, Any], start: int) -> Tensor:
    known = DTYPES | OTHERS
    if entry["dtype"] not in known:
        raise UserError(f"{file}: {name} has dtype {entry['dtype']}; {', '.join(known)} are known.")
    if not name.isprintable():
        raise ValueError(f"{name!a} is no name of a tensor")
    dtype, shape = known[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if len(shape) > MOST_AXES or any(type(n) is not int or not 0 <= n < LARGEST for n in (*shape, begin, end)):
        raise ValueError(f"{name}: a size or an offset is not a number of bytes that a file can have")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: shape {list(shape)} of {entry['dtype']} does not take bytes {begin} to {end}")
    return Tensor(file, shape, dtype, start + begin)


def _check_layout(file: Path, tensors: Mapping[str, Tensor], start: int, size: int) -> None:
    """The tensors' bytes fill the file without gap or overlap."""
    end, last = start, "its header"
    for name, tensor in tensors.items():
        if tensor.offset != end:
            raise UserError(f"{file} has a damaged header ({name} does not begin where {last} ends): fetch it again.")
        end, last = end + tensor.nbytes, name
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
