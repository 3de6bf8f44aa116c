"""Rotary embedding: interleaved pairs, frequencies as transformers computes them, two-dimensional angles for pictures."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from transformers import Llama4TextConfig, Llama4VisionConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama4.modeling_llama4 import Llama4VisionRotaryEmbedding

from maverick_jax.config import RopeScaling
from maverick_jax.ops.rope import inverse_frequencies, rotate, text_angles, vision_angles
from oracle.tiny_checkpoints import vision_values


@pytest.mark.parametrize("factor, high", [(16.0, 1.0), (8.0, 4.0)])
def test_scaled_frequencies(factor, high):
    """Scout's released 16/1/1, which has no smooth band to divide by, and the first release's 8/1/4."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it remarks on the official values
    scaling = dict(factor=factor, low_freq_factor=1.0, high_freq_factor=high, original_max_position_embeddings=8192)
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **scaling}
    theirs = ROPE_INIT_FUNCTIONS["llama3"](Llama4TextConfig(head_dim=128, rope_parameters=rope), "cpu")[0].numpy()
    assert_allclose(inverse_frequencies(128, 5e5, RopeScaling(**scaling)), theirs, rtol=1e-6)


def test_first_scaled_pair():
    """With 16/1/1 pairs 0 to 34 turn as without scaling and the others 16 times slower (spec section 1.3)."""
    scaling = RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=8192)
    ratio = inverse_frequencies(128, 5e5) / inverse_frequencies(128, 5e5, scaling)
    assert_allclose(ratio, [1.0] * 35 + [16.0] * 29, rtol=1e-6)


def test_pairs_are_interleaved():
    """Elements 2j and 2j + 1 are one complex number, in Meta's and in Hugging Face's checkpoints of Llama 4."""
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 5, 3, 8), np.float32)
    angles = random.uniform(-3, 3, (2, 5, 4)).astype(np.float32)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, :, None]
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    assert_allclose(np.asarray(rotate(jnp.asarray(x), jnp.asarray(angles))), expected, atol=1e-5)


def test_positions_stay_integers_until_the_angle():
    """Position 1,048,575 is not a bfloat16 number: an angle from a rounded position is another angle."""
    positions = jnp.array([[0, 257, 8191, 1048575]], jnp.int32)
    frequencies = inverse_frequencies(16, 5e5)
    expected = np.asarray(positions, np.float32)[..., None] * frequencies
    assert (np.asarray(text_angles(positions, frequencies)) == expected).all()


def test_vision_angles_are_transformers():
    """Column first, then row, counted from 1; the class token, last, is not turned."""
    theirs = Llama4VisionRotaryEmbedding(Llama4VisionConfig(**vision_values())).freqs_ci.numpy()
    ours = np.exp(1j * vision_angles(4, 16, 10000.0).astype(np.float64))
    assert_allclose(ours, theirs.reshape(ours.shape), atol=1e-6)


def test_a_rotation_rounds_once():
    """Heads in bfloat16 turn by float32 angles, sines and cosines; rounded too, these would move positions that are far apart."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((1, 9, 2, 16)), jnp.bfloat16)
    angles = text_angles(jnp.arange(8000, 8009, dtype=jnp.int32)[None], inverse_frequencies(16, 5e5))
    expected = rotate(x.astype(jnp.float32), angles).astype(jnp.bfloat16)
    assert (rotate(x, angles) == expected).all()
