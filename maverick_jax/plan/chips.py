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
    """One device as JAX counts it, and how many of them are joined by what.

    Attributes:
      memory: bytes of HBM.
      bandwidth: bytes per second from HBM.
      flops, fp8_flops: dense products per second, bfloat16 and FP8 (where the vendor names no FP8 rate, the bfloat16 one).
      link: bytes per second over ICI or NVLink, one direction.
      shapes: of a TPU, the slices it is sold in, in chips, smallest first.
      devices_per_chip: of a TPU, how many devices JAX makes of a chip.
      host: of a GPU, the most that its fast links join: a host, or a rack of GB200s.
      network: of a GPU, bytes per second to other hosts, one direction: its share of the network cards.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    fp8_flops: float
    link: float
    shapes: tuple[str, ...] = ()
    devices_per_chip: int = 1
    host: int = 0
    network: float = 0.0

    @property
    def is_gpu(self) -> bool:
        return self.host > 0

    @property
    def group(self) -> str:
        """What to call the GPUs that fast links join."""
        return "host" if self.host <= 8 else "rack"


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
LARGE = ("16x16x16", "16x16x24")
# A network card of 400 or 200 Gbit/s for each GPU: docs.nvidia.com/dgx-basepod (DGX H100, H200, B200: eight ConnectX-7;
# DGX A100: eight ConnectX-6), docs.nvidia.com/dgx/dgxgb200-user-guide; H20 and MI300X hosts are sold with the same cards.
NDR, HDR = 50e9, 25e9

CHIPS = {
    chip.name: chip
    for chip in (
        # docs.cloud.google.com/tpu/docs/v4: 32 GiB at 1,200 GB/s, 275 TFLOP/s; Jouppi et al., ISCA 2023, table 4: six ICI links
        # of 50 GB/s. Two TensorCores that JAX shows as one device. No FP8.
        Chip("v4", 32 * GIB, 1200e9, 275e12, 275e12, 300e9, (*CUBES, LARGE[0])),
        # docs.cloud.google.com/tpu/docs/v5e: 16 GB at 819 GB/s, 197 TFLOP/s, ICI 400 GB/s in both directions. No FP8.
        Chip("v5e", 16 * GIB, 819e9, 197e12, 197e12, 200e9, FLAT),
        # docs.cloud.google.com/tpu/docs/v5p: 95 GiB at 2,765 GB/s, 459 TFLOP/s in BF16 and FP8, ICI 1,200 GB/s in both
        # directions. Two TensorCores that JAX shows as one device.
        Chip("v5p", 95 * GIB, 2765e9, 459e12, 459e12, 600e9, (*CUBES, *LARGE)),
        # docs.cloud.google.com/tpu/docs/v6e: 32 GB at 1,600 GB/s (1,640 in older editions), 918 TFLOP/s in BF16 and FP8, ICI
        # 800 GB/s in both directions.
        Chip("v6e", 32 * GIB, 1600e9, 918e12, 918e12, 400e9, FLAT),
        # docs.cloud.google.com/tpu/docs/tpu7x: a chip has 192 GiB at 7,380 GB/s, 2,307 / 4,614 TFLOP/s in BF16 / FP8, ICI
        # 1,200 GB/s in both directions. JAX shows its two halves as two devices; here are the figures of a half.
        Chip("v7x", 96 * GIB, 3690e9, 1153.5e12, 2307e12, 300e9, CUBES, devices_per_chip=2),
        # NVIDIA A100 data sheet, SXM: 40 GB at 1,555 GB/s or 80 GB at 2,039 GB/s, 312 TFLOP/s; NVLink 600 GB/s in both
        # directions. No FP8.
        Chip("a100-40gb", 40 * GIB, 1555e9, 312e12, 312e12, 300e9, host=8, network=HDR),
        Chip("a100", 80 * GIB, 2039e9, 312e12, 312e12, 300e9, host=8, network=HDR),
        # NVIDIA publishes no data sheet of the H20. What sellers print agrees: 96 GB at 4.0 TB/s, 148 / 296 TFLOP/s in BF16 /
        # FP8, NVLink 900 GB/s in both directions.
        Chip("h20", 96 * GIB, 4000e9, 148e12, 296e12, 450e9, host=8, network=NDR),
        # NVIDIA H100 data sheet, SXM: 80 GB at 3.35 TB/s, 1,979 / 3,958 TFLOP/s in BF16 / FP8 with sparsity, which doubles
        # what dense products reach; NVLink 900 GB/s in both directions.
        Chip("h100", 80 * GIB, 3350e9, 989e12, 1979e12, 450e9, host=8, network=NDR),
        # NVIDIA H200 data sheet, SXM: 141 GB at 4.8 TB/s, otherwise as H100.
        Chip("h200", 141 * GIB, 4800e9, 989e12, 1979e12, 450e9, host=8, network=NDR),
        # NVIDIA DGX B200 data sheet: 1,440 GB at 64 TB/s, 72 / 144 PFLOP/s of FP8 / FP4 with sparsity for eight GPUs (BF16
        # is half of FP8); NVLink 1.8 TB/s in both directions.
        Chip("b200", 180 * GIB, 8000e9, 2250e12, 4500e12, 900e9, host=8, network=NDR),
        # nvidia.com/en-us/data-center/gb200-nvl72: 72 GPUs on one NVLink have 13.4 TB at 576 TB/s, 360 / 720 PFLOP/s in BF16 /
        # FP8 with sparsity, NVLink 130 TB/s in both directions.
        Chip("gb200", 186 * GIB, 8000e9, 2500e12, 5000e12, 900e9, host=72, network=NDR),
        # AMD Instinct MI300X data sheet: 192 GB at 5.3 TB/s, 1,307 / 2,615 TFLOP/s in BF16 / FP8, seven Infinity Fabric links
        # of 128 GB/s in both directions, one to each other GPU of the host.
        Chip("mi300x", 192 * GIB, 5300e9, 1307e12, 2615e12, 448e9, host=8, network=NDR),
    )
}
