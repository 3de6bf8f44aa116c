"""Rotary position embedding: one-dimensional for text, two-dimensional for vision.

Llama 4 rotates *interleaved* pairs (2j, 2j+1), in Meta's and in Hugging Face's checkpoints alike (spec section 2.1).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from maverick_jax.config import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """[head_dim / 2] float32 angles per position: `theta^(-2j / head_dim)`, scaled by wavelength for long contexts.

    Source: Llama 4 reference, `models/llama4/model.py` (`apply_scaling`). With equal low and high factors there is no
    smooth band and nothing is divided by their difference.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        original, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
        wavelength = 2 * math.pi / frequencies
        band = high - low
        smooth = (original / wavelength - low) / band if band else np.zeros_like(wavelength)
        blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
        scaled = np.where(wavelength > original / low, frequencies / scaling.factor, blended)
        frequencies = np.where(wavelength < original / high, frequencies, scaled)
    return frequencies.astype(np.float32)


def text_angles(positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """[..., T] integer positions -> [..., T, d/2] float32 angles. Positions stay integers until here."""
    return positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies).reshape((1,) * positions.ndim + (-1,))


def vision_angles(grid: int, head_dim: int, theta: float) -> np.ndarray:
    """[grid^2 + 1, head_dim / 2] float32 angles of a tile's patches; the class token, last, is not rotated.

    The first half of the pairs turns with the column, the second with the row, both counted from 1 (spec section 3.4).
    """
    frequencies = theta ** (-2 * np.arange(head_dim // 4, dtype=np.float64) / (head_dim // 2))
    row, column = np.divmod(np.arange(grid * grid), grid)
    angles = np.concatenate([(column + 1)[:, None] * frequencies, (row + 1)[:, None] * frequencies], axis=1)
    return np.concatenate([angles, np.zeros((1, head_dim // 2))]).astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn pair j of every head by its angle, in float32.

    Args:
      x: [B, T, H, d].
      angles: [B, T, d/2] (B may be 1) float32.

    Returns:
      [B, T, H, d] in x's dtype.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)
