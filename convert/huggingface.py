"""A Hugging Face directory as a source of our parameters, read slice by slice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from maverick_jax.config import Config
from maverick_jax.convert import safetensors
from maverick_jax.convert.names import Index, Place, compare_names, find_places
from maverick_jax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class HuggingFace:
    """Our parameters in the safetensors files of a directory.

    Attributes:
      directory: where the files are.
      parameters: our name -> (shape, dtype as stored), in the model's order.
      places: our name -> how it lies in its stored tensor.
    """

    def __init__(self, directory: Path, places: dict[str, Place], tensors: dict[str, safetensors.Tensor]):
        self.directory = directory
        self.places = places
        self.parameters = {name: (place.shape, tensors[place.tensor].dtype) for name, place in places.items()}
        self._tensors = tensors

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        return sorted({tensor.file for tensor in self._tensors.values()})

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a parameter, reading little more than its own bytes.

        Args:
          name: ours.
          index: a slice without step per axis of ours, as `jax.make_array_from_callback` passes.
        """
        place, tensor = self.places[name], self._tensors[self.places[name].tensor]
        out = np.empty([len(range(size)[part]) for size, part in zip(place.shape, index, strict=True)], tensor.dtype)
        safetensors.read_box(tensor.file, tensor.offset, place.file_shape, place.box(index), place.in_file_order(out))
        return out

    def position(self, name: str, index: Index) -> tuple[Path, int]:
        """Where in the files a slice begins: reading in this order reads each file from front to back."""
        place, tensor = self.places[name], self._tensors[self.places[name].tensor]
        row = math.prod(place.file_shape[1:]) * tensor.dtype.itemsize
        return tensor.file, tensor.offset + place.box(index)[0].start * row


def open_huggingface(directory: str | Path, config: Config) -> HuggingFace:
    """Open a Hugging Face checkpoint and check, from the headers alone, that it is whole and that it is `config`'s.

    Raises:
      UserError: quantized in a way we cannot read; a file, tensor or byte is missing; a tensor is unexpected or misshapen.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        if any(directory.glob("*.pth")):
            raise UserError(f"{directory} holds Meta's .pth files, which cannot be read yet: use the Hugging Face checkpoint.")
        raise UserError(f"{directory} is not a Hugging Face checkpoint: it has no config.json.")
    _refuse_quantized(directory / "config.json")
    places, tensors = find_places(config), read_tensors(directory)
    expected = {place.tensor: place.stored_shape for place in places.values()}
    compare_names(directory, tensors, expected)
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(f"{tensors[name].file}: {name} has shape {list(tensors[name].shape)}, config.json asks for {list(shape)}.")
    return HuggingFace(directory, places, tensors)


def read_tensors(directory: Path) -> dict[str, safetensors.Tensor]:
    """Every tensor of a directory, from one file or from the shards of an index; no weights are read."""
    if (directory / SINGLE).is_file():
        return safetensors.read_header(directory / SINGLE)
    if (directory / INDEX).is_file():
        return _read_shards(directory / INDEX)
    if any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} has safetensors files but no {INDEX}: fetch it too.")
    raise UserError(f"{directory} is not a Hugging Face checkpoint: it has neither {SINGLE} nor {INDEX}.")


def _read_shards(index: Path) -> dict[str, safetensors.Tensor]:
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) and Path(f).name == f for f in where.values()):
        raise UserError(f"{index} has no weight_map from tensors to files beside it: fetch it again.")
    files = sorted(set(where.values()))
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(f"{index} names {missing[0]}{more}, which is not there: fetch what is missing.")
    tensors: dict[str, safetensors.Tensor] = {}
    for file in files:
        found = safetensors.read_header(index.parent / file)
        listed = {name for name, home in where.items() if home == file}
        if astray := sorted(listed ^ found.keys()):
            has, lists = ("lacks", "lists") if astray[0] in listed else ("has", "does not list")
            raise UserError(f"{index.parent / file} {has} {astray[0]}, which {INDEX} {lists} there: fetch both again.")
        tensors |= found
    return tensors


def _refuse_quantized(file: Path) -> None:
    values = _read_json(file)
    for part in (values, values.get("text_config") or {}):
        if quantization := part.get("quantization_config"):
            raise UserError(f"{file}: quant_method {quantization.get('quant_method')!r} is not supported: use the bfloat16 checkpoint.")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): fetch it again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no JSON object: fetch it again.")
    return values
