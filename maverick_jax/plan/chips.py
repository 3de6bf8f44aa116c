"""Public figures of the accelerators that a plan can name.

Vendors write GB for memory and mean GiB: XLA reports 31.25 GiB of a v6e's "32 GB", nvidia-smi 81,559 MiB of an H100's
"80 GB". What is missing to the round figure is within the plan's reserve. Links are per device and per direction, all
ports together; vendors of both kinds print the sum of both directions.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it.

    Attributes:
      memory: bytes of HBM.
      bandwidth: bytes per second from HBM.
      flops, fp8_flops: dense products per second, bfloat16 and FP8 (where the vendor names no FP8 rate, the bfloat16 one).
      link: bytes per second to other devices of the topology, one direction.
      shapes: the topologies it is sold in, smallest first.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    fp8_flops: float
    link: float
    shapes: tuple[str, ...]

    @property
    def is_gpu(self) -> bool:
        return "x" not in self.shapes[-1]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24")
ONE_HOST = ("1", "2", "4", "8")  # GPUs behind one NVSwitch; between hosts the network binds, which is not modelled

CHIPS = {
    chip.name: chip
    for chip in (
        # docs.cloud.google.com/tpu/docs/v5e: 16 GB at 819 GB/s, 197 TFLOP/s, ICI 400 GB/s in both directions. No FP8.
        Chip("v5e", 16 * GIB, 819e9, 197e12, 197e12, 200e9, FLAT),
        # docs.cloud.google.com/tpu/docs/v5p: 95 GiB at 2,765 GB/s, 459 TFLOP/s in BF16 and FP8, ICI 1,200 GB/s in both
        # directions. Two TensorCores that JAX shows as one device.
        Chip("v5p", 95 * GIB, 2765e9, 459e12, 459e12, 600e9, CUBES),
        # docs.cloud.google.com/tpu/docs/v6e: 32 GB at 1,600 GB/s (1,640 in older editions), 918 TFLOP/s, ICI 800 GB/s in
        # both directions. No FP8 rate given.
        Chip("v6e", 32 * GIB, 1600e9, 918e12, 918e12, 400e9, FLAT),
        # NVIDIA H100 data sheet, SXM: 80 GB at 3.35 TB/s, 1,979 / 3,958 TFLOP/s in BF16 / FP8 with sparsity, which doubles
        # what dense products reach; NVLink 900 GB/s in both directions.
        Chip("h100", 80 * GIB, 3350e9, 989e12, 1979e12, 450e9, ONE_HOST),
        # NVIDIA H200 data sheet, SXM: 141 GB at 4.8 TB/s, otherwise as H100.
        Chip("h200", 141 * GIB, 4800e9, 989e12, 1979e12, 450e9, ONE_HOST),
        # NVIDIA DGX B200 data sheet: 1,440 GB at 64 TB/s, 72 / 144 PFLOP/s of FP8 / FP4 with sparsity for eight GPUs (BF16
        # is half of FP8); NVLink 1.8 TB/s in both directions.
        Chip("b200", 180 * GIB, 8000e9, 2250e12, 4500e12, 900e9, ONE_HOST),
    )
}
