"""A Hugging Face checkpoint to a model directory, in memory that does not grow with the model."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

from tqdm import tqdm

from maverick_jax.config import Config
from maverick_jax.convert.building import building, require_space
from maverick_jax.convert.huggingface import HuggingFace, open_huggingface
from maverick_jax.convert.model_directory import PARAMS, copy_companions, write_manifest
from maverick_jax.convert.names import Index, chunk_indices
from maverick_jax.convert.writer import Writer
from maverick_jax.errors import UserError

FINGERPRINT = "converted_from.json"  # what an unfinished directory was begun from


def convert(source_dir: str | Path, out: str | Path, *, progress: bool = True) -> Path:
    """Make the model directory `out` from a Hugging Face directory.

    It is built in `OUT.partial/` and renamed once. Interrupted, killed even, it goes on with the missing chunks when called again.

    Args:
      source_dir: with `config.json` and safetensors.
      out: must not exist.
      progress: show a bar with bytes and rate on stderr.

    Returns:
      `out`.

    Raises:
      UserError: an incomplete or inconsistent source, an existing destination, no space, or another process at it.
    """
    source_dir, out = Path(source_dir), Path(out)
    if not source_dir.is_dir():
        raise UserError(f"{source_dir} does not exist: give the directory that holds config.json and the weights.")
    source = open_huggingface(source_dir, Config.from_directory(source_dir))
    with building(out) as partial:
        _refuse_other_source(partial, source)
        _write_params(partial / PARAMS, source, progress=progress)
        # config.json and manifest.json come last: a directory without them is not taken for a model.
        copy_companions(source_dir, partial)
        write_manifest(partial, source.parameters, source.files)
    (out / FINGERPRINT).unlink()
    return out


def _write_params(path: Path, source: HuggingFace, *, progress: bool) -> None:
    chunks = {name: source.places[name].chunk_shape(dtype.itemsize) for name, (_, dtype) in source.parameters.items()}
    every = [(name, index) for name, (shape, _) in source.parameters.items() for index in chunk_indices(shape, chunks[name])]
    every.sort(key=lambda chunk: source.position(*chunk))

    def size(name: str, index: Index) -> int:
        return math.prod(part.stop - part.start for part in index) * source.parameters[name][1].itemsize

    with contextlib.closing(Writer(path, source.parameters, chunks)) as writer:
        missing = [chunk for chunk in every if not writer.has(*chunk)]
        total, todo = (sum(size(*chunk) for chunk in some) for some in (every, missing))
        require_space(path.parent, todo)
        with tqdm(total=total, initial=total - todo, unit="B", unit_scale=True, disable=not progress) as bar:
            for name, index in missing:
                writer.write(name, index, source.read(name, index))
                bar.update(size(name, index))


def _refuse_other_source(partial: Path, source: HuggingFace) -> None:
    """Go on with a directory only if these very files began it; two fine-tunes differ in nothing but bytes and times."""
    stats = {file.name: file.stat() for file in (source.directory / "config.json", *source.files)}
    text = json.dumps({name: {"bytes": stat.st_size, "modified_ns": stat.st_mtime_ns} for name, stat in stats.items()}, indent=2)
    file = partial / FINGERPRINT
    if not any(partial.iterdir()):
        file.write_text(text)
    elif not file.is_file() or file.read_text() != text:
        raise UserError(f"{partial} was begun from another checkpoint, or this one has changed since: remove it, then run this again.")
