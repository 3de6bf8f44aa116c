"""What our kernels in Pallas-Triton have to know of it: how far its offsets reach, and that jax means to remove it.

Importing this keeps jax's warning, which comes since 0.11 whenever such a kernel is lowered, away from users, who can do nothing about it.
"""

import warnings

import jax

# Offsets are counted in elements, in signed 32 bits, unless an array has more than 2^32 bytes. Those of one-byte elements between
# the two bounds would be read at addresses that are not theirs.
MOST_COUNTED, COUNTED_IN_64_BITS = 2**31, 2**32

warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)


def is_counted(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether offsets reach all of an array."""
    return x.size <= MOST_COUNTED or x.size * x.dtype.itemsize > COUNTED_IN_64_BITS
