"""A checkpoint of PyTorch to a model directory, in memory that does not grow with the model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from maverick_jax.convert.build.building import building_together, find_destination, partial_directory, refuse_inside, require_space
from maverick_jax.convert.build.conversion import Conversion, choose_workers, plan_parts, share
from maverick_jax.convert.build.digest import digest_chunks, digest_text
from maverick_jax.convert.build.human import human_bytes
from maverick_jax.convert.build.journal import Journal
from maverick_jax.convert.build.manifest import count_parameters, write_manifest
from maverick_jax.convert.build.model_source import ModelSource, open_origin
from maverick_jax.convert.build.steps import PLAIN, RECIPE, Step, check_target, note_requantized, plan_steps
from maverick_jax.convert.build.writer import Writer
from maverick_jax.convert.formats.companions import PARAMS, copy_companions, describe_weights
from maverick_jax.convert.formats.places import Shape
from maverick_jax.convert.formats.prompting import check_prompting
from maverick_jax.convert.formats.source import Source
from maverick_jax.ops.quantize import FORMATS
from maverick_jax.sharding import multihost


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """What a conversion did.

    Attributes:
      kind: of the source.
      tensors, parameters: in the result.
      bytes_read, bytes_written: of all tensors, whichever attempt and process did it.
      resumed: bytes of the result that an earlier attempt had written and this process has checked.
      seconds: of this attempt.
      not_finite: weights with NaN or infinite values.
      notes: of the source, a sentence each, such as what was passed over.
    """

    out: str
    kind: str
    tensors: int
    parameters: int
    bytes_read: int
    bytes_written: int
    resumed: int
    seconds: float
    not_finite: list[str]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<Summary of {self.out}: {self.as_text()}>"

    def as_text(self) -> str:
        """One line for people."""
        again = f", of which {human_bytes(self.resumed)} were there and are right" if self.resumed else ""
        rate = human_bytes((self.bytes_written - self.resumed) / self.seconds)
        return (
            f"{self.kind}: {self.parameters:,} parameters in {self.tensors:,} tensors, {human_bytes(self.bytes_written)}{again}, "
            f"in {self.seconds:,.1f} s ({rate}/s)"
        )


def convert(
    source_dir: str | Path,
    out: str | Path,
    *,
    target: str | None = None,
    quantize: str | Collection[str] | None = None,
    workers: int | None = None,
    digests: bool = True,
    progress: bool = False,
) -> Summary:
    """Make the model directory `out` from a checkpoint of PyTorch, whose kind is recognised, or from a model directory in another format.

    What can be known before a weight is read is refused before a weight is read. The result is built in `OUT.partial/` and renamed
    once. Interrupted, killed even, it goes on when called again: what was written is checked where it is, and the rest is done. Several
    processes (`sharding.multihost`) each convert their share.

    Args:
      source_dir: Hugging Face directory (safetensors) or Meta's (`.pth`); a Hub id; or a model directory, which takes a `target`.
      out: must not exist.
      target: bfloat16, float32, fp8, int8 or int4; None keeps every weight as it is stored, FP8 too.
      quantize: what fp8, int8 and int4 quantize, as a list or with commas: experts (the routed ones), shared, dense, attention; None is
        the experts.
      workers: threads; None: `conversion.WORKERS`, or the machine's cores if they are fewer. Large slices use fewer.
      digests: note SHA-256 of the source's files and digests of all tensors, for `verify`.
      progress: show a bar with bytes, rate, time left and the current tensor on stderr, if that is a terminal.

    Returns:
      What was done, with notes that its owner may want to read.

    Raises:
      UserError: an incomplete or inconsistent source, a tokenizer or chat template that cannot be used, an existing destination, no
        space, another process at it, or a model directory that is not what was written.
    """
    begin, workers, components = time.monotonic(), choose_workers(workers), check_target(target, quantize)
    out = find_destination(out)
    source = open_origin(source_dir, target)
    refuse_inside(out, source.directory)
    notes = (*source.notes, *check_prompting(source.directory))
    steps = plan_steps(source.config, source.parameters, target, components)
    if not partial_directory(out).exists():
        require_space(out, sum(leaf.nbytes for step in steps for leaf in step.outputs.values()))
    if isinstance(source, ModelSource):
        source.check_files()
    process, count = multihost.process_index(), multihost.process_count()
    task = _describe(source, target, components, digests)
    multihost.check_same({"the checkpoint (files, sizes, times) or what becomes of it": digest_text(json.dumps(task))})
    with building_together(out) as partial, contextlib.closing(Journal(partial, task, process)) as journal:
        writer = Writer(partial / PARAMS, {name: leaf for step in steps for name, leaf in step.outputs.items()})
        conversion = Conversion(source, journal, writer, digests=digests)
        every = plan_parts(source, steps)
        if process == 0:
            require_space(partial, sum(part.bytes_written for part in every if not conversion.is_noted(part)))
        own = share(every, process, count)
        files = [file for number, file in enumerate(source.files) if number * count // len(source.files) == process]
        total, disable = sum(part.bytes_read for part in own), None if progress and process == 0 else True
        with tqdm(total=total, unit="B", unit_scale=True, disable=disable, dynamic_ncols=True) as bar:
            conversion.run(own, files, workers=workers, bar=bar)
        if isinstance(source, ModelSource):
            source.check_rest(name for part in own for name in part.step.inputs)
        multihost.exchange("converted")
        journal.read()
        if process == 0:
            writer.close()
            _complete(partial, source, steps, journal, digests)
    if process == 0:
        journal.remove(out)
    return Summary(
        out=str(out),
        kind=source.kind,
        tensors=sum(len(step.outputs) for step in steps),
        parameters=count_parameters(_parameters(steps)),
        bytes_read=sum(part.bytes_read for part in every),
        bytes_written=sum(part.bytes_written for part in every),
        resumed=conversion.resumed,
        seconds=time.monotonic() - begin,
        not_finite=sorted(journal.not_finite),
        notes=(*notes, *note_requantized(steps)),
    )


def _describe(source: Source | ModelSource, target: str | None, quantize: Collection[str], digests: bool) -> dict[str, Any]:
    """What is converted into what: an unfinished directory goes on only with the same. Two fine-tunes differ in bytes and times alone,
    so processes on several hosts must see one and the same checkpoint."""
    config = next(source.directory / name for name in ("config.json", "params.json") if (source.directory / name).is_file())
    stats = {file.name: file.stat() for file in (config, *source.files)}
    files: dict[str, Any] = {name: {"bytes": stat.st_size, "modified_ns": stat.st_mtime_ns} for name, stat in stats.items()}
    components = sorted(quantize) if target in FORMATS else []
    if isinstance(source, ModelSource):
        files[PARAMS] = {"stamp": source.stamp()}
    return {"recipe": RECIPE, "target": target, "quantize": components, "digests": digests, "files": files}


def _complete(partial: Path, source: Source | ModelSource, steps: list[Step], journal: Journal, digests: bool) -> None:
    """Config and manifest come last: a directory without them is not taken for a model."""
    copy_companions(source.directory, partial)
    config = partial / "config.json"
    if not (source.directory / "config.json").is_file():  # not: if there is none here, for an earlier attempt may have left half of one
        config.write_text(json.dumps(source.config.to_huggingface(), indent=2) + "\n")
    target = journal.task["target"]
    fp8 = any(leaf.dtype == FORMATS["fp8"].values for step in steps for leaf in step.outputs.values())
    describe_weights(config, dtype=target if target in PLAIN else None, fp8=fp8)
    tensors = {name: _entry(step, name, source, journal, digests) for step in steps for name in step.outputs}
    files: dict[str, dict[str, Any]] = {file.name: {"bytes": file.stat().st_size} for file in source.files}
    for name, digest in journal.files.items():
        files[name]["sha256"] = digest.sha256
    facts = {name: journal.task[name] for name in ("target", "quantize")} | {"kind": source.kind, "source": files, "tensors": tensors}
    before = source.provenance() if isinstance(source, ModelSource) else None
    write_manifest(partial, _parameters(steps), not_finite=sorted(journal.not_finite) or None, before=before, **facts)


def _entry(step: Step, name: str, source: Source | ModelSource, journal: Journal, digests: bool) -> dict[str, Any]:
    """What the manifest says of a tensor: what it was made from and how, with digests of both sides."""
    leaf = step.outputs[name]
    entry: dict[str, Any] = {"shape": leaf.shape, "dtype": leaf.dtype.name, "transform": step.transform, "rounds": step.rounds}
    inputs = [name] if step.transform == "copy" else list(step.inputs)
    made_from = dict.fromkeys((file.name, stored) for parameter in inputs for file, stored in source.made_from(parameter))
    if not digests:
        return entry | {"from": [f"{file}:{stored}" for file, stored in made_from]}
    # A model directory that has no digests has none to pass on.
    entry["from"] = {f"{file}:{stored}": journal.files[file].tensors.get(stored, "") for file, stored in made_from}
    chunks = [journal.chunks[name, number] for number in range(len(step.indices))]
    return entry | {"digest": digest_chunks(chunks)}


def _parameters(steps: list[Step]) -> dict[str, tuple[Shape, np.dtype]]:
    return {name: (leaf.shape, leaf.dtype) for step in steps for name, leaf in step.outputs.items()}
