"""A model directory back to a Hugging Face checkpoint, bit for bit the tensors that it came from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maverick_jax.config import Config
from maverick_jax.convert import huggingface, safetensors
from maverick_jax.convert.building import building, require_space
from maverick_jax.convert.model_directory import ModelDirectory, copy_companions, open_model_directory
from maverick_jax.convert.names import Place, Shape, chunk_indices, compare_names, find_places, group_by_tensor
from maverick_jax.errors import UserError

SHARD = 5_000_000_000  # bytes, as transformers splits; one larger tensor has a file of its own


def export(model_dir: str | Path, hf_dir: str | Path, *, progress: bool = True) -> Path:
    """Write the safetensors files, index, config and tokenizer that transformers and other engines read.

    Args:
      model_dir: a finished model directory.
      hf_dir: must not exist; it is built in `HF_DIR.partial/` and renamed once.
      progress: show a bar with bytes and rate on stderr.

    Returns:
      `hf_dir`.

    Raises:
      UserError: no finished model directory, weights that are not `config.json`'s, an existing destination, or no space.
    """
    model_dir, hf_dir = Path(model_dir), Path(hf_dir)
    source = open_model_directory(model_dir)
    places = find_places(Config.from_directory(model_dir))
    compare_names(model_dir, source.parameters, places)
    for name, (shape, _) in source.parameters.items():
        if shape != places[name].shape:
            raise UserError(f"{model_dir}: {name} has shape {list(shape)}, config.json asks for {list(places[name].shape)}.")
    groups = group_by_tensor(places)
    tensors = {name: (places[parts[0]].stored_shape, source.parameters[parts[0]][1]) for name, parts in groups.items()}
    total = sum(_bytes(*tensor) for tensor in tensors.values())
    with building(hf_dir) as partial, tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for stale in partial.glob("*.safetensors"):  # of an attempt that was interrupted
            stale.unlink()
        require_space(partial, total)
        shards = _split(tensors)
        for file, names in shards.items():
            with open(partial / file, "wb") as stream:
                stream.write(safetensors.make_header({name: tensors[name] for name in names}))
                for name in names:
                    for block in _blocks(source, {part: places[part] for part in groups[name]}):
                        stream.write(block.view(np.uint8).data)
                        bar.update(block.nbytes)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, names in shards.items() for name in names}}
            (partial / huggingface.INDEX).write_text(json.dumps(index, indent=2) + "\n")
        copy_companions(model_dir, partial)
    return hf_dir


def _bytes(shape: Shape, dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _split(tensors: dict[str, tuple[Shape, np.dtype]]) -> dict[str, list[str]]:
    """File name -> tensors, each file at most `SHARD` bytes or one tensor."""
    shards: list[list[str]] = []
    filled = SHARD
    for name, tensor in tensors.items():
        if filled + _bytes(*tensor) > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _bytes(*tensor)
    # Wide dtypes first, as the library does: every tensor begins on a multiple of its item size.
    shards = [sorted(names, key=lambda name: -tensors[name][1].itemsize) for names in shards]
    if len(shards) == 1:
        return {huggingface.SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


def _blocks(source: ModelDirectory, parts: dict[str, Place]) -> Iterator[np.ndarray]:
    """A stored tensor's bytes from front to back, put together from its parts."""
    name, place = next(iter(parts.items()))
    dtype = source.parameters[name][1]
    for index in chunk_indices(place.shape, place.chunk_shape(dtype.itemsize)):
        rows = place.box(index)[0]
        block = np.empty((rows.stop - rows.start, *place.file_shape[1:]), dtype)
        for name, place in parts.items():
            block[:, *place.box(index)[1:]] = place.in_file_order(source.read(name, index))
        yield block.reshape(-1)
