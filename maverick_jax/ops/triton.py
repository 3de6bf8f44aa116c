"""What our kernels in Pallas-Triton share, and have to know of it: how far its offsets reach, and that jax means to remove it.

Importing this keeps jax's warning, which comes since 0.11 whenever such a kernel is lowered, away from users, who can do nothing about it.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from maverick_jax.ops.product import product

# Offsets are counted in elements, in signed 32 bits, unless an array has more than 2^32 bytes. Those of one-byte elements between
# the two bounds would be read at addresses that are not theirs.
MOST_COUNTED, COUNTED_IN_64_BITS = 2**31, 2**32

warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)


CONVERTS_FLOAT8 = 8.9  # compute capability


def converts_float8() -> bool:
    """Whether the cards here have an instruction from float8 to float16; those that a program is only compiled for have."""
    here = [float(device.compute_capability) for device in jax.local_devices() if device.platform == "gpu"]
    return min(here, default=CONVERTS_FLOAT8) >= CONVERTS_FLOAT8


def is_counted(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether offsets reach all of an array."""
    return x.size <= MOST_COUNTED or x.size * x.dtype.itemsize > COUNTED_IN_64_BITS


def dot(a, b, axes: tuple[int, int] = (1, 0)):
    """The product of two matrices over one axis of each."""
    return product(a, b, ((axes[0],), (axes[1],)))


def inside(first, size: int, total: int):
    """Which of the `size` indices from `first` on are below `total`; None if that is always all."""
    return first + jnp.arange(size) < total if total % size else None


def load(ref, *axes):
    """What a reference shows; zero where one of `axes`, masks of its axes or None, is false."""
    mask = _mask(ref.shape, axes)
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def store(ref, value, *axes):
    """In the reference's dtype, and only where none of `axes` is false."""
    plgpu.store(ref, value.astype(ref.dtype), mask=_mask(ref.shape, axes))


def _mask(shape, axes):
    places = [(axis, mask) for axis, mask in enumerate(axes) if mask is not None]
    masks = [jnp.broadcast_to(jnp.expand_dims(mask, [i for i in range(len(shape)) if i != axis]), shape) for axis, mask in places]
    return functools.reduce(jnp.logical_and, masks) if masks else None
