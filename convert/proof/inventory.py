"""What a directory holds: names, shapes, dtypes and bytes, without reading a weight."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maverick_jax.convert.build.human import human_bytes
from maverick_jax.convert.build.manifest import count_parameters
from maverick_jax.convert.build.model_directory import open_model_directory
from maverick_jax.convert.formats.agreement import NUMBER
from maverick_jax.convert.formats.companions import PARAMS
from maverick_jax.convert.formats.foreign import refuse_foreign
from maverick_jax.convert.formats.huggingface import read_names
from maverick_jax.convert.formats.meta import FILES, SCALES, read_file_names
from maverick_jax.convert.formats.recognize import find_directory
from maverick_jax.convert.formats.shards import check_names
from maverick_jax.convert.formats.tensor_file import Tensor
from maverick_jax.convert.formats.torch_file import read_index


class Entry(NamedTuple):
    """One tensor; `bytes` as stored."""

    parameter: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclasses.dataclass(frozen=True, repr=False)
class Inventory:
    """Every weight of a directory and the totals.

    Attributes:
      notes: what its owner may want to know, a sentence each, such as what was passed over.
    """

    directory: str
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"<Inventory of {self.directory}: {self.parameters:,} parameters in {len(self.entries):,} tensors, {human_bytes(self.bytes)}>"
        )

    @property
    def parameters(self) -> int:
        return count_parameters({entry.parameter: (entry.shape, np.dtype(entry.dtype)) for entry in self.entries})

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        entries = [entry._asdict() for entry in self.entries]
        return {
            "directory": self.directory,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "notes": list(self.notes),
            "tensors": entries,
        }

    def as_table(self) -> str:
        """Aligned columns, a line per tensor, and the totals."""
        head = ("parameter", "shape", "dtype", "bytes")
        body = [(e.parameter, " x ".join(map(str, e.shape)), e.dtype, f"{e.bytes:,}") for e in self.entries]
        total = (f"{len(self.entries):,} tensors", f"{self.parameters:,} parameters", "", f"{self.bytes:,}")
        widths = [max(map(len, column)) for column in zip(head, *body, total, strict=True)]
        lines = [f"{n:<{widths[0]}}  {s:<{widths[1]}}  {d:<{widths[2]}}  {b:>{widths[3]}}" for n, s, d, b in (head, *body, total)]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def inspect(directory: str | Path) -> Inventory:
    """The inventory of a model directory (our names), of a Hugging Face directory or of Meta's (their own names, by file).

    Raises:
      UserError: it is neither, or it is incomplete.
    """
    directory = find_directory(directory)
    notes: tuple[str, ...] = ()
    if (directory / PARAMS).exists():
        found = open_model_directory(directory).parameters
    else:
        refuse_foreign(directory)
        tensors, notes = _stored(directory)
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    entries = (Entry(name, shape, dtype.name, math.prod(shape) * dtype.itemsize) for name, (shape, dtype) in found.items())
    return Inventory(str(directory), tuple(sorted(entries, key=_by_layer)), notes)


def _stored(directory: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors by their own names, and notes."""
    ranks, scales = sorted(directory.glob(FILES)), sorted(directory.glob(SCALES))
    if (ranks or scales) and not any(directory.glob("*.safetensors")):
        spellings = {file: read_file_names(file) for file in ranks}
        found = {f"{file.stem}.{s.stored[name]}": tensor for file, s in spellings.items() for name, tensor in s.tensors.items()}
        found |= {f"{file.stem}.{name}": tensor for file in scales for name, tensor in _read_index(file).items()}
        return found, tuple(dict.fromkeys(note for s in spellings.values() for note in s.notes))
    spelling = read_names(directory)
    return {spelling.stored[name]: tensor for name, tensor in spelling.tensors.items()}, spelling.notes


def _read_index(file: Path) -> dict[str, Tensor]:
    tensors = read_index(file)
    check_names(file, tensors)
    return tensors


def table(directory: str | Path) -> str:
    """`inspect(directory)` as text."""
    return inspect(directory).as_table()


def _by_layer(entry: Entry) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if re.fullmatch(NUMBER, part) else (-1, part) for part in entry.parameter.split(".")]
