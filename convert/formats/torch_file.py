"""Where the tensors of a `.pth` file lie, without torch, and without running what a pickle may hold."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maverick_jax.convert.formats.tensor_file import Tensor
from maverick_jax.convert.formats.torch_archive import Record, read_archive
from maverick_jax.convert.formats.torch_pickle import MoreThanTensorsError, Stored, read_pickle
from maverick_jax.errors import UserError

DTYPES = {
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
    "torch.float16": np.dtype(np.float16),
    "torch.float32": np.dtype(np.float32),
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}
LARGEST, MOST_AXES = 1 << 63, 8

NOTHING = re.compile(r"(?!)")  # matches no name


def read_index(file: Path, *, without: re.Pattern[str] = NOTHING) -> dict[str, Tensor]:
    """Every tensor of a file that `torch.save` wrote as a dict; entries that are no tensors are left out.

    Args:
      without: names that are left out, whatever they are.

    Raises:
      UserError: the file is truncated, not such a file, or holds anything but plain data.
    """
    archive = read_archive(file)
    try:
        entries = read_pickle(archive.pickle)
    except MoreThanTensorsError as error:
        raise UserError(f"{file} holds more than tensors, none of which was run ({error}): fetch the released file.") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged or not a file of torch.save ({error}): fetch it again.") from error
    if not isinstance(entries, dict):
        raise UserError(f"{file} holds no dict of tensors: fetch it again.")
    tensors = {str(name): value for name, value in entries.items() if isinstance(value, Stored)}
    return {name: _locate(file, name, value, archive.data) for name, value in tensors.items() if not without.fullmatch(name)}


def _locate(file: Path, name: str, tensor: Stored, records: Mapping[str, Record]) -> Tensor:
    if tensor.dtype not in DTYPES:
        raise UserError(f"{file}: {name} has dtype {tensor.dtype}; {', '.join(DTYPES)} are supported.")
    if not name.isprintable() or not _are_sizes(tensor.size, tensor.stride, [tensor.offset, tensor.storage.count]):
        raise UserError(f"{file} is damaged ({name} has sizes that no tensor has): fetch it again.")
    if not _is_in_c_order(tensor.size, tensor.stride):
        raise UserError(f"{file}: {name} is not stored in C order: save it contiguous.")
    record = records.get(tensor.storage.record) if isinstance(tensor.storage.record, str) else None
    if record is None:
        raise UserError(f"{file} has no data of {name}: fetch it again.")
    dtype, of = DTYPES[tensor.dtype], tensor.storage.dtype
    if of not in (None, tensor.dtype) or tensor.storage.count * (dtype.itemsize if of else 1) != record.nbytes:
        raise UserError(f"{file} is damaged (the data of {name} has {record.nbytes:,} bytes, and it says otherwise): fetch it again.")
    found = Tensor(file, tuple(tensor.size), dtype, record.offset + tensor.offset * dtype.itemsize)
    if found.offset + found.nbytes > record.offset + record.nbytes:
        raise UserError(f"{file} is damaged ({name} is larger than its data): fetch it again.")
    return found


def _are_sizes(size: Any, stride: Any, others: list[Any]) -> bool:
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride) or len(size) > MOST_AXES:
        return False
    return all(type(number) is int and 0 <= number < LARGEST for number in (*size, *stride, *others))


def _is_in_c_order(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether each step along an axis passes over all that the axes behind it hold; an axis of size 1 takes no steps."""
    behind = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
    return 0 in size or all(n == 1 or step == rest for n, step, rest in zip(size, stride, behind, strict=True))
