"""The safetensors files of a Hugging Face directory: which of them hold the model, and every tensor in them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from maverick_jax.convert.formats import safetensors
from maverick_jax.convert.formats.agreement import some_of
from maverick_jax.convert.formats.tensor_file import Tensor
from maverick_jax.errors import UserError
from maverick_jax.json_file import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"(.+)-([0-9]+)-of-([0-9]+)\.safetensors")


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory by its name there, from its headers: no weights are read.

    The index says which files count, as elsewhere; without one it is `model.safetensors`, or shards of which none is missing.

    Raises:
      UserError: a file is missing, damaged, or not what the index says, or a tensor is there twice or has a name that is no name.
    """
    if (directory / INDEX).is_file():
        where = _read_index(directory / INDEX)
        files = sorted(set(where.values()))
        missing = [file for file in files if not _is_file(directory / file)]
        if not missing:
            return _read_files(directory, files, where)
        if missing != files or not _is_file(directory / SINGLE):
            raise UserError(
                f"{directory / INDEX} names {some_of(missing, 1)}, which is not there{_hint(directory, missing[0])}: fetch what is missing."
            )
    if _is_file(directory / SINGLE):
        return _read_files(directory, [SINGLE])
    return _read_files(directory, _complete_shards(directory))


def left_out(directory: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """Safetensors files beside those that hold the tensors, such as an older copy of the model in one file."""
    read = {tensor.file.name for tensor in tensors.values()}
    return sorted(file.name for file in directory.glob("*.safetensors") if file.name not in read)


def check_names(file: Path, names: Collection[str]) -> None:
    """Refuse names of tensors that would not stay on a line, or move the cursor."""
    for name in names:
        if not name or not name.isprintable():
            raise UserError(f"{file} names a tensor {name!a:.100}, which no model has: fetch the file again.")


def _read_index(index: Path) -> dict[str, str]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) and f and Path(f).name == f for f in where.values()):
        raise UserError(f"{index} has no weight_map from tensors to files beside it: fetch it again.")
    return where


def _complete_shards(directory: Path) -> list[str]:
    """The files `NAME-1-of-N` to `NAME-N-of-N` of a directory without an index."""
    files = sorted(file.name for file in directory.glob("*.safetensors"))
    sets: dict[tuple[str, str], dict[int, str]] = {}
    for file in files:
        if found := SHARD.fullmatch(file):
            sets.setdefault((found[1], found[3]), {})[int(found[2])] = file
    if len(sets) > 1:
        kinds = [f"{name}-*-of-{total}" for name, total in sets]
        raise UserError(f"{directory} has no {INDEX}, and shards of several checkpoints, {some_of(kinds)}: fetch the index too.")
    if not sets and files:
        raise UserError(f"{directory} has {some_of(files, 1)} but no {INDEX}: if one file is the whole model, call it {SINGLE}.")
    if not sets:
        raise UserError(f"{directory} is not a Hugging Face checkpoint: it has neither {SINGLE} nor {INDEX}.")
    (((name, total), found),) = sets.items()
    count = int(total)
    wanted = range(1, count + 1)
    if (lost := next((n for n in wanted if n not in found), None)) is not None:
        file = f"{name}-{lost:0{len(total)}}-of-{total}.safetensors"
        raise UserError(f"{directory} has no {INDEX} and {len(found)} of {count} shards, without {file}: fetch what is missing.")
    return [found[n] for n in wanted]


def _read_files(directory: Path, files: Collection[str], where: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The tensors of all files; with an index, those that it lists in each and no others."""
    listed: dict[str, set[str]] = {}
    for name, file in (where or {}).items():
        listed.setdefault(file, set()).add(name)
    tensors: dict[str, Tensor] = {}
    for name in files:
        file = directory / name
        found = safetensors.read_header(file)
        check_names(file, found)
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{twice[0]} is in {tensors[twice[0]].file.name} and in {file}: fetch both again.")
        if where is not None and (astray := sorted(listed[name] ^ found.keys())):
            has, lists = ("lacks", "lists") if astray[0] in listed[name] else ("has", "does not list")
            raise UserError(f"{file} {has} {astray[0]}, which {INDEX} {lists} there: fetch both again.")
        tensors |= found
    return tensors


def _is_file(file: Path) -> bool:
    """Whether there is such a file; links that lead in a circle or names too long for the system are none."""
    try:
        return file.is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def _hint(directory: Path, missing: str) -> str:
    """The file in another case of letters, as some file systems make it."""
    same = [file.name for file in directory.glob("*.safetensors") if file.name.casefold() == missing.casefold()]
    return f" under that name, but as {same[0]}" if same else ""
