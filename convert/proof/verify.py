"""Is a model directory what was made, and is it what the checkpoint makes?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from maverick_jax.convert.build.conversion import Part, choose_workers, do_parts, plan_parts
from maverick_jax.convert.build.digest import FileDigest, digest_array, digest_chunk, digest_chunks, digest_file
from maverick_jax.convert.build.human import human_bytes
from maverick_jax.convert.build.model_directory import ModelDirectory, open_model_directory, recognize_manifest
from maverick_jax.convert.build.model_source import ModelSource, open_origin
from maverick_jax.convert.build.steps import Step, plan_steps
from maverick_jax.convert.build.writer import array_path
from maverick_jax.convert.formats.companions import PARAMS
from maverick_jax.convert.formats.recognize import local_path
from maverick_jax.convert.formats.source import Source
from maverick_jax.errors import UserError


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What was looked at and what was found.

    Attributes:
      problems: one line each; none if all is well.
      tensors, bytes: whose digests were taken.
      rederived: tensors that were made from the source once more and compared.
      exact: the weights are the checkpoint's own, nothing was rounded.
      seconds: that it took.
      notes: of the source.
    """

    problems: list[str]
    tensors: int
    bytes: int
    rederived: int
    exact: bool
    seconds: float
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Report: {self.as_text()}>"

    def as_text(self) -> str:
        """One line for people."""
        again = f", and {self.rederived:,} tensors made again from the checkpoint" if self.rederived else ""
        found = f"{len(self.problems):,} problems" if self.problems else "all as it was written"
        return f"{self.tensors:,} digests of {human_bytes(self.bytes)}{again}, in {self.seconds:,.1f} s: {found}"


def verify(model_dir: str | Path, source_dir: str | Path | None = None, *, workers: int | None = None, progress: bool = False) -> Report:
    """Take all digests of a model directory again, and with a source make every tensor again and compare.

    Args:
      model_dir: a finished model directory.
      source_dir: the checkpoint or model directory that it was made from, or a Hub id; None compares with nothing.
      workers: threads; None: as many as `convert` takes.
      progress: show a bar on stderr, if that is a terminal.

    Returns:
      What was looked at; what is wrong is in its `problems`, one line each, and raises nothing.

    Raises:
      UserError: no finished model directory, no digests in it, or no checkpoint of this model.
    """
    begin, directory, workers = time.monotonic(), local_path(model_dir), choose_workers(workers)
    manifest = recognize_manifest(directory)
    tensors = {name: entry for name, entry in manifest.get("tensors", {}).items() if "digest" in entry}
    if not tensors and "tensors" in manifest and source_dir is None:
        raise UserError(f"{directory} was made without digests: compare it with its checkpoint, --against SRC.")
    source = None if source_dir is None else open_origin(source_dir, manifest.get("target"))  # before all the reading: it may be none
    problems = list(_changed_files(directory, manifest.get("files", {})))
    total, rederived = 0, 0
    try:
        model = open_model_directory(directory)
        steps = [] if source is None else _plan_again(model, source, manifest)
        total = sum(model.nbytes(name) for name in tensors if name in model.parameters)
        with _bar("digests", total, progress) as bar, ThreadPoolExecutor(workers) as pool:
            problems += filter(None, pool.map(lambda name: _check_tensor(model, name, tensors[name]["digest"], bar), tensors))
        if source is not None:
            rederived = len(model.parameters)
            problems += _rederive(model, source, steps, manifest, workers=workers, progress=progress)
    except UserError as error:
        if not problems:
            raise
        problems.append(str(error))
    exact = not any(entry.get("rounds") for entry in manifest.get("tensors", {}).values())
    notes = source.notes if source else ()
    return Report(problems, len(tensors), total, rederived, exact, time.monotonic() - begin, notes)


def _bar(what: str, total: int, progress: bool) -> tqdm:
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None if progress else True, dynamic_ncols=True)


def _changed_files(directory: Path, files: Mapping[str, str]) -> Iterator[str]:
    for name, digest in files.items():
        file = directory / name
        try:
            if not file.is_file():
                yield f"{file} is missing."
            elif digest_file(file) != digest:
                yield f"{file} is not what was written."
        except OSError as error:
            yield f"{file} cannot be read: {error.strerror}."


def _check_tensor(model: ModelDirectory, name: str, digest: str, bar: tqdm) -> str | None:
    if name not in model.parameters:
        return f"{name} is missing."
    found = []
    for file in model.chunk_files(name):
        if not file.is_file():
            return f"{name} is not what was written: {file} is missing."
        found.append(digest_chunk(file))
        bar.update(file.stat().st_size)
    bar.set_postfix_str(name, refresh=False)
    if digest_chunks(found) == digest:
        return None
    return f"{name} is not what was written: {array_path(model.directory / PARAMS, name)} has changed."


def _plan_again(model: ModelDirectory, source: Source | ModelSource, manifest: Mapping[str, Any]) -> list[Step]:
    """What the conversion did, if it was from such a source."""
    steps = plan_steps(source.config, source.parameters, manifest.get("target"), manifest.get("quantize", ()))
    expected = {name: leaf.shape for step in steps for name, leaf in step.outputs.items()}
    if expected != {name: shape for name, (shape, _) in model.parameters.items()}:
        raise UserError(f"{source.directory} is not the checkpoint that {model.directory} was made from: other names or shapes.")
    return steps


def _rederive(
    model: ModelDirectory,
    source: Source | ModelSource,
    steps: list[Step],
    manifest: Mapping[str, Any],
    *,
    workers: int,
    progress: bool,
) -> list[str]:
    """Make every tensor again and compare; say which of the source's files and tensors have changed since the conversion."""
    differing: set[str] = set()

    def compare(part: Part) -> None:
        made = part.step.run(part.step.read(source, part.index))
        for (name, index), values in zip(part.outputs, made, strict=True):
            try:
                stored = model.read(name, index)
            except UserError:
                stored = None
            if stored is None or digest_array(np.ascontiguousarray(values)) != digest_array(stored):
                differing.add(name)

    parts = plan_parts(source, steps)
    with _bar("against the source", sum(part.bytes_read for part in parts), progress) as bar:
        digests = do_parts(source, parts, compare, source.files, workers=workers, bar=bar)
    problems = [f"{name} is not what {source.directory} makes of it." for name in sorted(differing)]
    return problems + list(_changed_sources(source, digests, manifest))


def _changed_sources(source: Source | ModelSource, digests: Mapping[Path, FileDigest], manifest: Mapping[str, Any]) -> Iterator[str]:
    noted = {key: digest for entry in manifest.get("tensors", {}).values() if "digest" in entry for key, digest in entry["from"].items()}
    for file, now in digests.items():
        if now.sha256 == manifest.get("source", {}).get(file.name, {}).get("sha256", now.sha256):
            continue
        changed = [name for name, digest in now.tensors.items() if noted.get(f"{file.name}:{name}") != digest]
        yield f"{file} has changed since it was converted: {', '.join(changed) or 'its header'}."
