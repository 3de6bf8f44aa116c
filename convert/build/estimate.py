"""What a conversion would read and write, whether there is room, and how long it would take on these disks."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import shutil
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from maverick_jax.convert.build.building import find_destination, refuse_inside
from maverick_jax.convert.build.human import human_bytes
from maverick_jax.convert.build.manifest import count_parameters
from maverick_jax.convert.build.model_source import ModelSource, open_origin
from maverick_jax.convert.build.steps import check_target, note_requantized, plan_steps
from maverick_jax.convert.formats.prompting import check_prompting
from maverick_jax.convert.formats.recognize import refuse_download
from maverick_jax.convert.formats.source import Source
from maverick_jax.convert.formats.tensor_file import forget, read_bytes
from maverick_jax.errors import UserError

SAMPLE = 128 << 20  # bytes read and written to see how fast the disks are
BLOCK = 8 << 20


@dataclasses.dataclass(frozen=True, repr=False)
class Estimate:
    """A conversion that has not been done.

    Attributes:
      transforms: copy, cast, quantize, … -> how many weights.
      bytes_read, bytes_written: of all tensors.
      free: bytes on the disk of the destination.
      read_rate, write_rate: bytes per second, measured; writing includes the sync.
      seconds: one after the other, which is what one disk for both does.
      notes: of the source.
    """

    source: str
    kind: str
    files: int
    tensors: int
    parameters: int
    transforms: dict[str, int]
    bytes_read: int
    bytes_written: int
    free: int
    read_rate: float
    write_rate: float
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        sizes = f"reads {human_bytes(self.bytes_read)}, writes {human_bytes(self.bytes_written)}"
        return f"<Estimate of {self.source}: {sizes}, about {_duration(self.seconds)}>"

    @property
    def seconds(self) -> float:
        return self.bytes_read / self.read_rate + self.bytes_written / self.write_rate

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return dataclasses.asdict(self) | {"seconds": self.seconds}

    def as_text(self) -> str:
        """For people, a line per question."""
        room = self.free - self.bytes_written
        left = f"{human_bytes(room)} left" if room >= 0 else f"{human_bytes(-room)} TOO LITTLE"
        rates = f"reads {human_bytes(self.read_rate)}/s, writes {human_bytes(self.write_rate)}/s (measured)"
        rows = {
            "source": f"{self.source}: {self.kind}, {self.files} file{'s' * (self.files != 1)}",
            "reads": human_bytes(self.bytes_read),
            "writes": f"{human_bytes(self.bytes_written)} in {self.tensors:,} tensors of {self.parameters:,} parameters",
            "weights": ", ".join(f"{name} {count:,}" for name, count in self.transforms.items()),
            "disk": f"{human_bytes(self.free)} free, {left}",
            "time": f"about {_duration(self.seconds)}: {rates}",
        }
        return "\n".join(f"{name:<8}{text}" for name, text in rows.items())


def estimate(
    source_dir: str | Path, out: str | Path, *, target: str | None = None, quantize: str | Collection[str] | None = None
) -> Estimate:
    """Everything about `convert` with the same arguments but its result; nothing is left on the disk.

    Raises:
      UserError: as `convert` before it begins to write; or a source that would have to be fetched from the Hub.
    """
    components, out = check_target(target, quantize), find_destination(out)
    refuse_download(source_dir)
    source = open_origin(source_dir, target)
    refuse_inside(out, source.directory)
    notes = (*source.notes, *check_prompting(source.directory))
    steps = plan_steps(source.config, source.parameters, target, components)
    leaves = {name: (leaf.shape, leaf.dtype) for step in steps for name, leaf in step.outputs.items()}
    place = next(parent for parent in out.absolute().parents if parent.is_dir())
    return Estimate(
        source=str(source.directory),
        kind=source.kind,
        files=len(source.files),
        tensors=len(leaves),
        parameters=count_parameters(leaves),
        transforms=dict(collections.Counter(step.transform for step in steps)),
        bytes_read=sum(math.prod(shape) * dtype.itemsize for shape, dtype in source.parameters.values()),
        bytes_written=sum(leaf.nbytes for step in steps for leaf in step.outputs.values()),
        free=shutil.disk_usage(place).free,
        read_rate=_read_rate(source),
        write_rate=_write_rate(place),
        notes=(*notes, *note_requantized(steps)),
    )


def _read_rate(source: Source | ModelSource) -> float:
    files = [*source.model.files()] if isinstance(source, ModelSource) else source.files
    file = max(files, key=lambda file: file.stat().st_size)
    size = min(SAMPLE, file.stat().st_size)
    forget(file, 0, size)
    buffer, begin = memoryview(bytearray(BLOCK)), time.perf_counter()
    for at in range(0, size, BLOCK):
        read_bytes(file, at, buffer[: min(BLOCK, size - at)])
    return size / (time.perf_counter() - begin)


def _write_rate(place: Path) -> float:
    try:
        with tempfile.TemporaryFile(dir=place) as stream:
            block, begin = os.urandom(BLOCK), time.perf_counter()
            for _ in range(SAMPLE // BLOCK):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
            return SAMPLE / (time.perf_counter() - begin)
    except OSError as error:
        raise UserError(f"nothing can be written to {place} ({error.strerror}): choose another destination.") from error


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
