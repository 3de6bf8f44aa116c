"""A Hugging Face directory as a source: bfloat16 (or another plain dtype), or the official FP8 checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maverick_jax.config import Config
from maverick_jax.convert import names, safetensors
from maverick_jax.convert.companions import FP8_METHOD, FP8_WEIGHTS
from maverick_jax.convert.names import compare_names, huggingface_name, kind_of
from maverick_jax.convert.places import Place, Shape
from maverick_jax.convert.source import Piece, Source
from maverick_jax.convert.tensor_file import Tensor
from maverick_jax.convert.tied import as_one_table
from maverick_jax.errors import UserError
from maverick_jax.ops.quantize import FORMATS

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FP8 = FORMATS["fp8"].values
INSTEAD = "use the bfloat16 checkpoint or the official FP8 one."


def open_huggingface(directory: Path, config: Config) -> Source:
    """Open a Hugging Face checkpoint and check, from the headers alone, that it is whole and that it is `config`'s.

    Raises:
      UserError: quantized in a way we cannot read; a file, tensor or byte is missing; a tensor is unexpected or misshapen.
    """
    quantized = _is_fp8(directory)
    tensors = read_tensors(directory)
    prefixed = any(name.startswith("language_model.") for name in tensors)
    if config.text.tie_word_embeddings:
        table, other = (huggingface_name(names.plain_row(name), name, prefixed=prefixed) for name in ("text.embedding", "text.unembedding"))
        tensors = as_one_table(directory, tensors, table, other)
    pieces, missing = {}, []
    for name, (shape, _, _) in names.weights(config).items():
        for ours, row, leaf_shape, experts in _leaves(name, shape, tensors, prefixed):
            stored = {e: huggingface_name(row, ours, prefixed=prefixed, expert=e) for e in experts}
            missing += [tensor for tensor in stored.values() if tensor not in tensors]
            place = Place.of(row.axes, leaf_shape, row.stored_axes)
            pieces[ours] = [Piece(t, tensors[t], place.at(0, e)) for e, t in stored.items() if t in tensors]
    _check_fp8(directory, tensors, {piece.stored for name in pieces if name.endswith(".values") for piece in pieces[name]}, quantized)
    compare_names(directory, tensors, [*missing, *(piece.stored for parts in pieces.values() for piece in parts)])
    return Source(directory, "Hugging Face FP8" if quantized else "Hugging Face", config, pieces)


def _leaves(name: str, shape: Shape, tensors: dict[str, Tensor], prefixed: bool) -> Iterator[tuple[str, names.Row, Shape, range]]:
    """Our leaves of a weight: itself, or values and scales where the experts are stored one by one."""
    plain = names.plain_row(name)
    quantized = [row for row in names.HUGGINGFACE_FP8 if row.ours.startswith(f"{kind_of(name)}.")]
    if not any(huggingface_name(row, name, prefixed=prefixed) in tensors for row in quantized):
        yield name, plain, shape, range(1)
        return
    for row in quantized:
        leaf = row.ours.rpartition(".")[2]
        yield f"{name}.{leaf}", row, shape if leaf == "values" else (shape[0], 1, shape[2]), range(shape[0])


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, from one file or from the shards of an index; no weights are read."""
    if (directory / SINGLE).is_file():
        return safetensors.read_header(directory / SINGLE)
    if (directory / INDEX).is_file():
        return _read_shards(directory / INDEX)
    if any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} has safetensors files but no {INDEX}: fetch it too.")
    raise UserError(f"{directory} is not a Hugging Face checkpoint: it has neither {SINGLE} nor {INDEX}.")


def _read_shards(index: Path) -> dict[str, Tensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) and f and Path(f).name == f for f in where.values()):
        raise UserError(f"{index} has no weight_map from tensors to files beside it: fetch it again.")
    files = sorted(set(where.values()))
    missing = [file for file in files if not _is_file(index.parent / file)]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(f"{index} names {missing[0]}{more}, which is not there: fetch what is missing.")
    tensors: dict[str, Tensor] = {}
    listed: dict[str, set[str]] = {}
    for name, file in where.items():
        listed.setdefault(file, set()).add(name)
    for file in files:
        found = safetensors.read_header(index.parent / file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{twice[0]} is in {tensors[twice[0]].file.name} and in {index.parent / file}: fetch both again.")
        if astray := sorted(listed[file] ^ found.keys()):
            has, lists = ("lacks", "lists") if astray[0] in listed[file] else ("has", "does not list")
            raise UserError(f"{index.parent / file} {has} {astray[0]}, which {INDEX} {lists} there: fetch both again.")
        tensors |= found
    return tensors


def _is_file(file: Path) -> bool:
    """Whether there is such a file; links that lead in a circle or names too long for the system are none."""
    try:
        return file.is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def _is_fp8(directory: Path) -> bool:
    """Whether the directory is quantized as the official FP8 checkpoint is; any other way is refused by its name."""
    file = directory / "config.json"
    found = read_json(file).get("quantization_config")
    if found is None:
        if (directory / "hf_quant_config.json").is_file():
            raise UserError(f"{directory / 'hf_quant_config.json'}: quantized by NVIDIA ModelOpt, which is not supported: {INSTEAD}")
        return False
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method != FP8_METHOD["quant_method"]:
        detail = f" ({found['quant_algo']})" if isinstance(found, dict) and found.get("quant_algo") else ""
        raise UserError(f"{file}: quant_method {method!r}{detail} is not supported: {INSTEAD}")
    groups = found.get("config_groups")
    weights = [group.get("weights") if isinstance(group, dict) else None for group in (groups.values() if isinstance(groups, dict) else [])]
    weights = [some if isinstance(some, dict) else {} for some in weights or [None]]
    wrong = {"format": found.get("format")} if found.get("format") != FP8_METHOD["format"] else {}
    wrong |= {name: some.get(name) for some in weights for name, value in FP8_WEIGHTS.items() if some.get(name) != value}
    if wrong:
        text = ", ".join(f"{name} {value!r}" for name, value in wrong.items())
        raise UserError(f"{file}: compressed-tensors with {text} is not supported: {INSTEAD}")
    return True


def _check_fp8(directory: Path, tensors: dict[str, Tensor], values: set[str], quantized: bool) -> None:
    """FP8 tensors are routed experts with a scale beside them, and the config knows of them."""
    for name, tensor in tensors.items():
        if tensor.dtype != FP8 and name in values:
            raise UserError(f"{tensor.file}: {name} is {tensor.dtype}, but experts that are stored one by one must be FP8: {INSTEAD}")
        if tensor.dtype != FP8:
            continue
        if not quantized:
            raise UserError(f"{tensor.file}: {name} is FP8, but config.json has no quantization_config: {INSTEAD}")
        if name not in values:
            raise UserError(f"{tensor.file}: {name} is FP8; of Hugging Face checkpoints only the routed experts may be: {INSTEAD}")
        if f"{name}_scale" not in tensors:
            raise UserError(f"{directory} has FP8 values {name} but no {name}_scale: fetch the checkpoint again.")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): fetch it again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no JSON object: fetch it again.")
    return values
