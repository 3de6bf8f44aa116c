"""What the real compiler says of a program: memory, HBM traffic, FLOPs, collectives, and how long it took."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from maverick_jax.plan.case import Case
from maverick_jax.plan.hlo import Traffic, count_traffic
from maverick_jax.plan.programs import Program, Programs
from maverick_jax.plan.targets import OPTIONS, devices_of
from maverick_jax.plan.topology import Topology
from maverick_jax.sharding.mesh import arrange


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program on one device of its mesh. Sizes in bytes.

    Attributes:
      arguments: weights, cache and inputs.
      temporaries: the most that the program holds besides.
      traffic: HBM traffic and collectives by the rule of `plan.hlo`.
      flops, bytes_accessed: the compiler's own count, staging copies included; None where it gives none (GPU).
      seconds: to compile.
    """

    name: str
    arguments: int
    temporaries: int
    traffic: Traffic
    flops: float | None
    bytes_accessed: float | None
    seconds: float

    @property
    def needed(self) -> int:
        return self.arguments + self.temporaries

    def __str__(self) -> str:
        gb = 1e9
        own = (
            f", {self.traffic.launches:,} launches"
            if self.bytes_accessed is None
            else f", cost_analysis {self.bytes_accessed / gb:.2f} GB and {(self.flops or 0) / 1e12:.3f} TFLOP"
        )
        lines = [
            f"{self.name}, compiled in {self.seconds:.0f} s, per device: arguments {self.arguments / gb:.2f} GB, "
            f"temporaries {self.temporaries / gb:.3f} GB, HBM traffic {self.traffic.hbm / gb:.2f} GB "
            f"({self.traffic.hbm / self.arguments:.2f} x the arguments){own}"
        ]
        for kind, collective in sorted(self.traffic.collectives.items()):
            lines.append(f"  {collective.count:4} {kind:20} {collective.payload / 1e6:10.2f} MB")
        if self.traffic.loops_counted_once:
            lines.append(f"  {self.traffic.loops_counted_once} loops whose trips the text does not state are counted once")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        collectives = {kind: {"count": c.count, "bytes": c.payload} for kind, c in self.traffic.collectives.items()}
        own = {name: getattr(self, name) for name in ("name", "arguments", "temporaries", "flops", "bytes_accessed", "seconds")}
        traffic = {"read": self.traffic.read, "written": self.traffic.written, "loops_counted_once": self.traffic.loops_counted_once}
        return own | {"hbm": traffic, "collectives": collectives, "launches": self.traffic.launches}


def target_mesh(topology: Topology, shape: tuple[int, ...]) -> Mesh:
    """A mesh over devices that are not there."""
    return arrange(devices_of(topology), shape, topology.name)


def compile_program(program: Program, mesh: Mesh, options: Mapping[str, Any] | None = None) -> Compiled:
    """Compile and take account. `options` are XLA's, such as `xla_tpu_scoped_vmem_limit_kib`."""
    platform = mesh.devices.flat[0].platform
    lowered = program.lower()
    start = time.perf_counter()
    done = lowered.compile(compiler_options={**OPTIONS["tpu" if platform == "tpu" else "cuda"], **(options or {})})
    seconds = time.perf_counter() - start
    memory, cost, text = done.memory_analysis(), done.cost_analysis() or {}, done.as_text()
    assert memory is not None
    assert text is not None
    return Compiled(
        program.name,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        count_traffic(text),
        cost.get("flops"),
        cost.get("bytes accessed"),
        seconds,
    )


def compile_decode(case: Case) -> Compiled:
    """The decode step of a plan."""
    mesh = target_mesh(case.topology, case.mesh_shape)
    return compile_program(Programs(case.config, mesh, case.layout, case.dtype).decode(case.batch, case.context), mesh)
