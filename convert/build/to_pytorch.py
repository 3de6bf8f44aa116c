"""A model directory back to a Hugging Face checkpoint, bit for bit the tensors that it came from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from maverick_jax.config import Config
from maverick_jax.convert.build.building import building, find_destination, refuse_inside, require_space
from maverick_jax.convert.build.merged import Merged, Parameters
from maverick_jax.convert.build.model_source import ModelSource, open_model_source
from maverick_jax.convert.build.steps import PLAIN, check_parameters, plan_steps
from maverick_jax.convert.formats import names, safetensors
from maverick_jax.convert.formats.companions import COMPANIONS, copy_companions, describe_weights
from maverick_jax.convert.formats.names import find_places, huggingface_name
from maverick_jax.convert.formats.places import Index, Place, Shape, chunk_indices
from maverick_jax.convert.formats.prompting import check_prompting
from maverick_jax.convert.formats.recognize import find_directory, local_path
from maverick_jax.convert.formats.shards import INDEX, SINGLE
from maverick_jax.errors import UserError
from maverick_jax.ops.quantize import FORMATS

SHARD = 5_000_000_000  # bytes, as transformers splits; one larger tensor has a file of its own


class Layout(NamedTuple):
    """A tensor to write: `parts` are our parameters in it and where, one, or the gate and up of the experts."""

    shape: Shape
    dtype: np.dtype
    parts: dict[str, Place]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class MultipliedOut:
    """A model directory whose quantized weights read as what they stand for."""

    def __init__(self, source: ModelSource, target: str):
        self.source = source
        self.steps = {step.weight: step for step in plan_steps(source.config, source.parameters, target)}
        self.parameters = {name: (leaf.shape, leaf.dtype) for step in self.steps.values() for name, leaf in step.outputs.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        step = self.steps[name]
        return step.run(step.read(self.source, index))[0]


def export(
    model_dir: str | Path, hf_dir: str | Path, *, target: str | None = None, merge: str | Path | None = None, progress: bool = False
) -> Path:
    """Write the safetensors files, index, config and tokenizer that transformers and other engines read.

    All weights are held against the digests of the model directory as they are read; where it was made without, nothing is checked.

    Args:
      model_dir: a finished model directory.
      hf_dir: must not exist; it is built in `HF_DIR.partial/` and renamed once.
      target: bfloat16 or float32; None keeps what is stored: plain weights, or FP8 experts in the official layout.
      merge: directory of a LoRA for this model, or a Hub id, that is added to its weights.
      progress: show a bar with bytes and rate on stderr, if that is a terminal.

    Returns:
      `hf_dir`.

    Raises:
      UserError: no finished model directory, or one that is not what was written; weights that are not `config.json`'s or have no
        Hugging Face layout; an adapter for another base; an existing destination, or no space. There is no `hf_dir` then.
    """
    if target is not None and target not in PLAIN:
        raise UserError(f"format {target!r:.100} is unknown: choose one of {', '.join(PLAIN)}, or none to keep what is stored.")
    model_dir, hf_dir = local_path(model_dir), find_destination(hf_dir)
    stored = open_model_source(model_dir)
    refuse_inside(hf_dir, model_dir)
    check_prompting(model_dir)
    source: Parameters = stored
    try:
        check_parameters(stored.config, stored.parameters)
    except UserError as error:
        raise UserError(f"{model_dir}: {error}") from error
    if target is not None:
        source = MultipliedOut(stored, target)
    if merge is not None:
        source = Merged(source, stored.config, find_directory(merge))
    tensors = lay_out(source, stored.config, model_dir)
    total = sum(tensor.nbytes for tensor in tensors.values())
    stored.check_files()
    begun = ("*.safetensors", INDEX, *COMPANIONS)
    with building(hf_dir, afresh=begun) as partial, tqdm(total=total, unit="B", unit_scale=True, disable=None if progress else True) as bar:
        require_space(partial, total)
        shards = _split(tensors)
        for file, inside in shards.items():
            with open(partial / file, "wb") as stream:
                stream.write(safetensors.make_header({name: (tensors[name].shape, tensors[name].dtype) for name in inside}))
                for name in inside:
                    bar.set_postfix_str(name, refresh=False)
                    for block in _blocks(source, tensors[name]):
                        stream.write(block.view(np.uint8).data)
                        bar.update(block.nbytes)
        stored.check_rest(stored.parameters)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, inside in shards.items() for name in inside}}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        copy_companions(model_dir, partial)
        fp8 = any(tensor.dtype == FORMATS["fp8"].values for tensor in tensors.values())
        describe_weights(partial / "config.json", dtype=target, fp8=fp8)
    return hf_dir


def lay_out(source: Parameters, config: Config, directory: Path) -> dict[str, Layout]:
    """Every tensor of the Hugging Face checkpoint, in the model's order."""
    places = find_places(config)
    wanted = [
        leaf for name in places for leaf in ((f"{name}.values", f"{name}.scales") if f"{name}.values" in source.parameters else (name,))
    ]
    tensors: dict[str, Layout] = {}
    for name in wanted:
        dtype = source.parameters[name][1]
        if name not in places:
            tensors |= _one_by_one(name, source, config, directory)
            continue
        stored, place = places[name]
        parts = tensors[stored].parts if stored in tensors else {}
        if parts and tensors[stored].dtype != dtype:
            raise UserError(
                f"{directory}: {name} is {dtype}, what shares a tensor with it is {tensors[stored].dtype}: export with --format."
            )
        tensors[stored] = Layout(place.stored_shape, dtype, {**parts, name: place})
    for stored, tensor in tensors.items():
        if sum(math.prod(place.shape) for place in tensor.parts.values()) < math.prod(tensor.shape):
            raise UserError(f"{directory} has only a part of {stored} in plain numbers: export with --format bfloat16.")
    return tensors


def _one_by_one(name: str, source: Parameters, config: Config, directory: Path) -> dict[str, Layout]:
    """Values or scales of the routed experts as the official FP8 checkpoint has them."""
    row = names.one_by_one_row(name)
    weight = name.rpartition(".")[0]
    shape, dtype = source.parameters[name]
    if row is None or source.parameters[f"{weight}.values"][1] != FORMATS["fp8"].values or source.parameters[f"{weight}.scales"][0][1] != 1:
        raise UserError(
            f"{directory}: {weight} has no quantized Hugging Face layout: export with --format bfloat16, which multiplies it out."
        )
    place = Place.of(row.axes, shape, row.stored_axes)
    stored = [huggingface_name(row, name, prefixed=config.vision is not None, expert=expert) for expert in range(shape[0])]
    return {tensor: Layout(place.stored_shape, dtype, {name: place.at(0, expert)}) for expert, tensor in enumerate(stored)}


def _split(tensors: dict[str, Layout]) -> dict[str, list[str]]:
    """File name -> tensors, each file at most `SHARD` bytes or one tensor."""
    shards: list[list[str]] = []
    filled = SHARD
    for name, tensor in tensors.items():
        if filled + tensor.nbytes > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    # Wide dtypes first, as the library does: every tensor begins on a multiple of its item size.
    shards = [sorted(inside, key=lambda name: -tensors[name].dtype.itemsize) for inside in shards]
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": inside for i, inside in enumerate(shards, 1)}


def _blocks(source: Parameters, tensor: Layout) -> Iterator[np.ndarray]:
    """A stored tensor's bytes from front to back, put together from its parts."""
    first = next(iter(tensor.parts.values()))
    for index in chunk_indices(first.shape, first.chunk_shape(tensor.dtype.itemsize)):
        rows = first.box(index)[0]
        block = np.empty((rows.stop - rows.start, *first.file_shape[1:]), tensor.dtype)
        for name, place in tensor.parts.items():
            block[:, *place.box(index)[1:]] = place.in_file_order(source.read(name, place.whole(index)))
        yield block.reshape(-1)
