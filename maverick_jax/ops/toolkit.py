"""Which of jax's two toolkits for kernels on GPU multiplies rows by experts: Pallas-Triton, or Pallas-Mosaic-GPU on Hopper.

Triton's kernels were measured on an H200, and are taken unless `MAVERICK_GPU_KERNELS=mosaic` says otherwise: Mosaic's are compiled for
Hopper and tested as jax simulates them, and no card has timed them yet (`benchmarks/on_gpu.py` does).
"""

import os

import jax

from maverick_jax.errors import UserError

CHOICE = "MAVERICK_GPU_KERNELS"
TOOLKITS = ("triton", "mosaic")
HOPPER = "9.0"  # the compute capability; later cards have other instructions


def on_hopper() -> bool:
    """Whether the cards here are Hopper's; those that a program is only compiled for are thought to be."""
    return all(device.compute_capability == HOPPER for device in jax.local_devices() if device.platform == "gpu")


def wants_mosaic() -> bool:
    """As the environment says.

    Raises:
      UserError: it names no toolkit, or Mosaic for cards that are not Hopper's.
    """
    chosen = os.environ.get(CHOICE) or TOOLKITS[0]
    if chosen not in TOOLKITS:
        raise UserError(f"{CHOICE}={chosen}: choose one of {', '.join(TOOLKITS)}")
    if chosen == "triton":
        return False
    for device in jax.local_devices():
        if device.platform == "gpu" and device.compute_capability != HOPPER:
            has = f"{device.device_kind} has {device.compute_capability}"
            raise UserError(f"{CHOICE}=mosaic needs compute capability {HOPPER} (Hopper), and {has}: without it Triton's are used")
    return True
