"""Pages of keys and values as a device holds them: in the model's dtype, or in 8 bits with a scale per head and slot.

Shape suffixes: N pages, P slots of a page, K key/value heads, d head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LARGEST = 127.0


class Pages(NamedTuple):
    """Pages of one layer.

    Attributes:
      key_NKPd, value_NKPd: in the model's dtype or, with scales, in 8 bits.
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
