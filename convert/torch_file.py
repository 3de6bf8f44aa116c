"""Where the tensors of a `.pth` file lie, without reading them and without running what a pickle may hold."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maverick_jax.convert.tensor_file import Tensor
from maverick_jax.errors import UserError

DTYPES = {
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
    "torch.float16": np.dtype(np.float16),
    "torch.float32": np.dtype(np.float32),
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}

NOTHING = re.compile(r"(?!)")  # matches no name


def read_index(file: Path, *, without: re.Pattern[str] = NOTHING) -> dict[str, Tensor]:
    """Every tensor of a file that `torch.save` wrote as a dict; entries that are no tensors are left out.

    torch loads tensors without data, which know their offsets in the file; the pickle may name tensors and buffers of bytes, and
    whatever else it names is refused before it runs.

    Args:
      without: names that are left out, whatever they are.

    Raises:
      UserError: torch is not installed; the file is truncated, not such a file, or holds anything but plain data.
    """
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        raise UserError("reading .pth files takes PyTorch: pip install 'maverick-jax[torch]'.") from None
    try:
        with torch.serialization.safe_globals([io.BytesIO]), FakeTensorMode():
            entries = torch.load(file, weights_only=True, mmap=False, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} holds more than tensors, none of which was run ({_first(error)}): fetch the released file.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # torch meets bytes that it does not expect with many kinds, struct.error and AssertionError among them
        raise UserError(f"{file} is damaged or not a file of torch.save ({_first(error)}): fetch it again.") from error
    if not isinstance(entries, dict):
        raise UserError(f"{file} holds no dict of tensors: fetch it again.")
    tensors = {str(name): value for name, value in entries.items() if isinstance(value, torch.Tensor)}
    return {name: _locate(file, name, value) for name, value in tensors.items() if not without.fullmatch(name)}


def _locate(file: Path, name: str, tensor: Any) -> Tensor:
    if str(tensor.dtype) not in DTYPES:
        raise UserError(f"{file}: {name} has dtype {tensor.dtype}; {', '.join(DTYPES)} are supported.")
    if not tensor.is_contiguous():
        raise UserError(f"{file}: {name} is not stored in C order: save it contiguous.")
    offset = tensor.untyped_storage()._checkpoint_offset
    if offset is None:
        raise UserError(f"{file} is in torch's format before 1.6, or has no data: load it and save it again with torch.save.")
    found = Tensor(file, tuple(tensor.shape), DTYPES[str(tensor.dtype)], offset + tensor.storage_offset() * tensor.element_size())
    if found.offset + found.nbytes > file.stat().st_size:
        raise UserError(f"{file} ends before {name} does: the download is incomplete; fetch this file again.")
    return found


def _first(error: Exception) -> str:
    """What went wrong, without torch's advice to load the file unsafely."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines[1:] and lines[-1].startswith("Check the documentation"):
        lines = lines[-2:]
    return lines[0].rpartition("WeightsUnpickler error: ")[2][:200] if lines else type(error).__name__
