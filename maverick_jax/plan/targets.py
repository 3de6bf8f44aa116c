"""Devices to compile for on a machine that has none of them: the TPU and the GPU compiler need no accelerator."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from maverick_jax.errors import UserError
from maverick_jax.plan.topology import Topology

# Public properties of the chips, in the text form of XLA's GpuTargetConfigProto.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{name}"
"""
GPUS = {
    "h100": _HOPPER.format(bandwidth=3_352_320_000_000, memory=84_978_434_048, name="NVIDIA H100 80GB HBM3"),
    "h200": _HOPPER.format(bandwidth=4_800_000_000_000, memory=150_754_820_096, name="NVIDIA H200"),
}
# What libtpu calls a slice where it has another name, and what it must be told beside the name.
TPU_NAMES = {"v7x": "tpu7x"}
TPU_SETTINGS = {"v4": {"chip_config_name": "megacore"}}  # both cores of a chip are one device, as on a real slice
OPTIONS = {
    # There is nothing to tune a kernel on.
    "cuda": {"xla_gpu_autotune_level": 0},
    "tpu": {},
}


def devices_of(topology: Topology) -> Sequence[Any]:
    """All devices of a topology, to lay a mesh over and compile for; nothing runs on them.

    Raises:
      UserError: the compiler is not installed, or has no description of the chip.
    """
    chip = topology.chip
    if not chip.is_gpu:
        # What libtpu asks of a TPU host; and other processes may compile at the same time.
        for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"), ("TPU_ACCELERATOR_TYPE", "v6e-64")):
            os.environ.setdefault(name, value)
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        settings: dict[str, Any] = dict(TPU_SETTINGS.get(chip.name, {}))
        if topology.shape == "1x1":  # of which libtpu expects four on a host
            settings["chips_per_host_bounds"] = (1, 1, 1)
        return _describe("tpu", "tpu", topology_name=f"{TPU_NAMES.get(chip.name, chip.name)}:{topology.shape}", **settings)
    if chip.name not in GPUS:
        raise UserError(f"the GPU compiler can be asked about {', '.join(GPUS)}, not about {chip.name}: leave out --compile.")
    hosts = topology.hosts
    return _describe("cuda", "cuda13", topology=f"{hosts}x1x{topology.devices // hosts}", target_config=GPUS[chip.name])


def _describe(platform: str, extra: str, **description: Any) -> Sequence[Any]:
    try:
        return topologies.get_topology_desc(platform=platform, **description).devices
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(f"the {platform} compiler cannot be used here ({error}): pip install 'maverick-jax[{extra}]'.") from error
