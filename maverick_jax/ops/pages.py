"""Pages of keys and values as a device holds them: in the model's dtype, or in 8 bits with a scale per head and slot.

Shape suffixes: N pages, P slots of a page, K key/value heads, d head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

LARGEST = 127.0
BITS = jnp.dtype("uint16")


class Pages(NamedTuple):
    """Pages of one layer.

    Attributes:
      key_NKPd, value_NKPd: in the model's dtype or its bits, or, with scales, in 8 bits.
      key_scale_NKP, value_scale_NKP: float32; a key is `key * scale`. None: there are none.
    """

    key_NKPd: jax.Array
    value_NKPd: jax.Array
    key_scale_NKP: jax.Array | None = None
    value_scale_NKP: jax.Array | None = None

    @property
    def slots(self) -> int:
        """Of a page."""
        return self.key_NKPd.shape[2]


def held(dtype: DTypeLike, *, cpu: bool) -> jnp.dtype:
    """The dtype of pages for keys and values of a dtype.

    On a CPU floats of two bytes are held as integers of the same bits: up to jax 0.10 XLA:CPU writes and reads narrow floats by way
    of float32, and widens the whole pool for it (1.7 ms for 8 MB, where the integers take 10 µs).
    """
    dtype = jnp.dtype(dtype)
    return BITS if cpu and dtype.itemsize == 2 else dtype


def as_held(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """New keys or values as pages of this dtype hold them."""
    return lax.bitcast_convert_type(x, BITS) if dtype == BITS else x.astype(dtype)


def as_floats(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """What was held, in the model's dtype if it was held as its bits."""
    return lax.bitcast_convert_type(x, dtype) if x.dtype == BITS else x


def quantize_keys(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys or values in 8 bits, those of a head and slot by their own largest magnitude.

    Args:
      x: [..., d], finite.

    Returns:
      [..., d] int8 and [...] float32 scales; `values * scale` is off by at most half a scale.
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=-1)
    scale = jnp.where(largest == 0, 1, largest / LARGEST)
    return jnp.rint(x / scale[..., None]).astype(jnp.int8), scale
