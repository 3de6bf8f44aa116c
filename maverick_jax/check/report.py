"""`check`: everything together, as a text for people and a dictionary for programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from maverick_jax.bench.machine import KINDS, WIDTH, WIDTH_ELSEWHERE, measured, quickest
from maverick_jax.check.installed import notes, versions
from maverick_jax.check.kernels import ALLOWED, Case, Sizes, cases
from maverick_jax.check.links import Exchange, exchanges
from maverick_jax.config import Config
from maverick_jax.errors import first_line
from maverick_jax.plan.chips import CHIPS, GIB, Chip
from maverick_jax.plan.weights import check_dtype
from maverick_jax.sharding import Layout, make_mesh

STACK_BYTES = {"cpu": 2**28}  # of the experts that are tried
MEMORY_SHARE = 0.3  # of a device's, for a stack; its float32 random numbers take as much again


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of a kernel.

    Attributes:
      error: ‖ours - reference‖ / ‖reference‖; like the time not a number if it did not run.
      trouble: why it did not.
    """

    name: str
    allowed: float
    shapes: str = ""
    error: float = math.nan
    seconds: float = math.nan
    moved: float = 0.0
    flops: float = 0.0
    trouble: str = ""

    @property
    def right(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        line = f"{'ok ' if self.right else 'BAD'}  {self.name:16} {self.shapes:46}"
        if self.trouble:
            return f"{line} {self.trouble}"
        rates = f"{self.moved / self.seconds / 1e9:8,.1f} GB/s  {self.flops / self.seconds / 1e12:7,.2f} TFLOP/s"
        return f"{line} {self.error:.1e} of {self.allowed:.0e}  {1e3 * self.seconds:8.3f} ms  {rates}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found on this process's devices.

    Attributes:
      bandwidth, flops: per second, as measured.
      chip: what its data sheet says, if it is a known one.
    """

    versions: str
    devices: str
    bandwidth: float
    flops: float
    chip: Chip | None
    question: str
    kernels: tuple[Finding, ...]
    links: tuple[Exchange, ...]
    notes: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        return all(found.right for found in (*self.kernels, *self.links))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield self.versions
        yield self.devices
        chip, of = self.chip, ""
        if chip is not None:
            of = f" ({self.bandwidth / chip.bandwidth:.0%} and {self.flops / chip.flops:.0%} of its data sheet)"
        yield f"reads {self.bandwidth / 1e9:,.1f} GB/s, multiplies {self.flops / 1e12:,.2f} TFLOP/s{of}"
        yield f"\nkernels, {self.question}: error beside float64, time, and what is read and multiplied at least"
        yield from map(str, self.kernels)
        if self.links:
            yield "\nlinks"
        for link in self.links:
            state = "ok " if link.right else "BAD"
            speed = f"{link.sent / 1e6:,.1f} MB from each device in {1e3 * link.seconds:.3f} ms: {link.sent / link.seconds / 1e9:,.2f} GB/s"
            yield f"{state}  {link.name:16} {speed}"
        if self.notes:
            yield ""
        yield from (f"note: {note}." for note in self.notes)
        wrong = [found.name for found in (*self.kernels, *self.links) if not found.right]
        yield f"\nwrong: {', '.join(wrong)}. Please report it with this text." if wrong else "\nall is well"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "healthy": self.healthy,
            "versions": self.versions,
            "devices": self.devices,
            "bandwidth": self.bandwidth,
            "flops": self.flops,
            "kernels": [{name: _finite(value) for name, value in vars(found).items()} for found in self.kernels],
            "links": [link._asdict() for link in self.links],
            "notes": list(self.notes),
        }


def check(config: Config, axes: dict[str, int], layout: Layout, dtype: str, *, model: str = "the model") -> Report:
    """Look at this machine with the sizes of a model on a mesh.

    Args:
      axes: of the mesh, as `make_mesh` takes them.
      dtype: one of `plan.weights.DTYPES`.
      model: what to call it.

    Raises:
      UserError: an unknown dtype, a mesh that there are no devices for or that does not divide the model.
    """
    check_dtype(dtype)
    mesh = make_mesh(**axes)
    layout.check(config, mesh)
    devices = list(mesh.devices.flat)
    here = next(device for device in devices if device.process_index == jax.process_index())
    memory = (here.memory_stats() or {}).get("bytes_limit", 0)
    simulated = len(devices) if here.platform == "cpu" else 1
    sizes = Sizes.of(config, mesh, layout, dtype)
    chip = measured(here, sizes.dtype, WIDTH.get(here.platform, WIDTH_ELSEWHERE), 1 / simulated)
    with jax.default_device(here):
        most = STACK_BYTES.get(here.platform, MEMORY_SHARE * (memory or 16 * GIB))
        kernels = tuple(try_out(name, make, ALLOWED[sizes.dtype.name]) for name, make in cases(sizes, here.platform, most).items())
    shape = ",".join(f"{axis}={size}" for axis, size in axes.items() if size > 1)
    share = f"a device's share on {shape}, layout {layout.name}" if shape else "on one device"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return Report(
        versions=versions(),
        devices=f"{len(devices)} x {here.device_kind}{processes}" + (f", {memory / GIB:,.1f} GiB each for jax" if memory else ""),
        bandwidth=chip.bandwidth,
        flops=chip.flops,
        chip=CHIPS.get(KINDS.get(here.device_kind, "")),
        question=f"{model} in {dtype}, {share}",
        kernels=kernels,
        links=tuple(exchanges(mesh)),
        notes=tuple(notes(devices)),
    )


def try_out(name: str, make: Callable[[], Case], allowed: float) -> Finding:
    """Run a kernel, hold it against float64, and time it. Whatever it raises is what is to be found out."""
    found = Finding(name, allowed=allowed)
    try:
        case = make()
        found = dataclasses.replace(found, shapes=case.shapes, moved=float(case.moved), flops=float(case.flops))
        ours, expected = case.both(np.asarray(case.function(*case.operands)))
        error = float(np.linalg.norm(ours.astype(np.float64) - expected) / np.linalg.norm(expected))
        return dataclasses.replace(found, error=error, seconds=quickest(case.function, *case.operands))
    except Exception as error:
        return dataclasses.replace(found, trouble=first_line(error))


def _finite(value: Any) -> Any:
    """JSON has no other numbers."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
