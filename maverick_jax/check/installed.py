"""What is installed, and what this machine would need besides: an accelerator that jax does not see, a library that is not there."""

from __future__ import annotations

import glob
import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from maverick_jax.errors import first_line

SHOWN = ("maverick-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
EXTRAS = {  # what they bring, and what that is for
    "torch": ("torch", "reads .pth checkpoints"),
    "hub": ("huggingface_hub", "fetches checkpoints by their Hub id"),
    "gcs": ("gcsfs", "opens gs:// directories"),
    "grammar": ("llguidance", "holds answers to a schema, a grammar or a choice"),
    "notebooks": ("matplotlib", "draws"),
}
ACCELERATORS = {  # what to call one, its device files, jax's plug-ins, and the extras that bring them
    "cuda": (
        "an NVIDIA GPU",
        ("/dev/nvidia[0-9]*", "/dev/dxg"),
        ("jax-cuda12-plugin", "jax-cuda13-plugin"),
        "'maverick-jax[cuda13]', or [cuda12] for a driver below 580",
    ),
    "tpu": ("a TPU", ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*"), ("libtpu",), "'maverick-jax[tpu]'"),
}
BFLOAT16, FP8 = 8.0, 8.9  # the compute capabilities from which there is hardware for them


def versions() -> str:
    """One line."""
    found = ", ".join(f"{name} {version}" for name in SHOWN if (version := _version(name)))
    return f"{found}, Python {sys.version.split()[0]}, {platform.platform()}"


def notes(devices: Sequence[Any]) -> Iterator[str]:
    """What a user should know, each with what to do about it."""
    yield from _unseen(devices)
    if devices[0].platform == "gpu":
        yield from _about_gpu(devices[0])
    missing = {extra: use for extra, (package, use) in EXTRAS.items() if _version(package) is None}
    if missing:
        uses = "; ".join(f"{extra} {use}" for extra, use in missing.items())
        yield f"not installed: {uses}. To have one: pip install 'maverick-jax[{next(iter(missing))}]'"


def _unseen(devices: Sequence[Any]) -> Iterator[str]:
    """Accelerators that this machine has and that jax does not use."""
    if devices[0].platform != "cpu":
        return
    kept_to = _kept_to()
    for kind, (name, files, plugins, extras) in ACCELERATORS.items():
        if not any(map(glob.glob, files)):
            continue
        if kept_to:
            yield f"this machine has {name}, but JAX_PLATFORMS={kept_to} keeps jax from it: unset it"
        elif not any(map(_version, plugins)):
            yield f"this machine has {name}, and jax no plug-in for it: pip install {extras}"
        else:
            yield (
                f"this machine has {name}, and jax cannot use it ({_why_not(kind)}): see that its driver is new enough, and that no "
                "other process holds it"
            )


def _kept_to() -> str | None:
    return jax.config.values["jax_platforms"]


def _why_not(kind: str) -> str:
    try:
        jax.devices(kind)
    except RuntimeError as error:
        return first_line(error)
    return "it starts when asked for"


def _about_gpu(device: Any) -> Iterator[str]:
    capability = float(getattr(device, "compute_capability", 0) or 0)
    card = f"{device.device_kind} (compute capability {capability})"
    if 0 < capability < BFLOAT16:
        yield f"{card} has no bfloat16: give float16 or float32 as dtype"
    if 0 < capability < FP8:
        yield f"{card} has no instruction for FP8 weights, and takes several: `maverick convert --format int8` makes faster ones"
    try:
        x = jnp.zeros((1, 128, 8, 64), jnp.bfloat16)
        jax.block_until_ready(jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn"))
    except Exception as error:  # whatever it is, attention goes without it
        yield f"cuDNN cannot be used ({first_line(error)}), and long prompts take several times as long: pip install -U 'jax[cuda13]'"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
