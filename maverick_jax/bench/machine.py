"""What the devices of a run can do at most: the vendor's figures of a chip that we know, and measurements of any other."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from maverick_jax.plan.chips import CHIPS, Chip
from maverick_jax.plan.topology import Topology

# jax's `device_kind`; TPUs as jax._src.pallas.mosaic.tpu_info spells them. Cards with PCIe have other rates, and are measured.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H20": "h20",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "AMD Instinct MI300X": "mi300x",
}
READ_BYTES = 2**28  # more than caches hold
WIDTH = {"cpu": 2048}  # of the matrices of a product
WIDTH_ELSEWHERE = 8192
REPEATS = 8


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices that a model lies on.

    Attributes:
      topology: of a chip that is not known, one whose rates are measured; simulated devices have equal shares of them.
      said: the rates of a device and where they come from, as a line.
    """

    topology: Topology
    said: str


def machine_of(devices: Collection[Any], dtype: DTypeLike) -> Machine:
    """What these devices can do, measured where nobody has published their figures: one of this process, products in `dtype`."""
    devices = list(devices)
    kind, platform = devices[0].device_kind, devices[0].platform
    hosts = len({device.process_index for device in devices})
    many = f"{len(devices)} devices, each" if len(devices) > 1 else "1 device"
    if kind in KINDS:
        chip, source = dataclasses.replace(CHIPS[KINDS[kind]], devices_per_chip=1), "by its data sheet"
    else:
        width = WIDTH.get(platform, WIDTH_ELSEWHERE)
        here = next(device for device in devices if device.process_index == jax.process_index())
        chip = measured(here, dtype, width, 1 / len(devices) if platform == "cpu" else 1.0)
        source = f"measured: a sum over {READ_BYTES / 1e6:,.0f} MB, and a product of {width:,} x {width:,} matrices in {jnp.dtype(dtype)}"
    rates = f"reads {chip.bandwidth / 1e9:,.1f} GB/s, multiplies {chip.flops / 1e9:,.0f} GFLOP/s"
    shape = f"{len(devices) // hosts}x{hosts}" if hosts > 1 else str(len(devices))
    return Machine(Topology(chip, shape), f"{many} of {kind}: {rates} ({source})")


def measured(device: Any, dtype: Any, width: int, share: float) -> Chip:
    """A device as it is found: `share` of what it reaches alone, where several are simulated by one processor."""
    numbers = jax.device_put(jnp.ones(READ_BYTES // 4, jnp.float32), device)
    matrix = jax.device_put(jnp.ones((width, width), dtype), device)
    bandwidth = share * READ_BYTES / quickest(jax.jit(jnp.sum), numbers)
    flops = share * 2 * width**3 / quickest(jax.jit(jnp.matmul), matrix, matrix)
    memory = int((device.memory_stats() or {}).get("bytes_limit", 0))
    return Chip(device.device_kind, memory, bandwidth, flops, flops, link=math.inf)


def quickest(function: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    """Seconds of a call, the best of several."""
    jax.block_until_ready(function(*arguments))
    best = math.inf
    for _ in range(REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        best = min(best, time.perf_counter() - started)
    return best
