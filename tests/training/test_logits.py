"""What is computed from logits in pieces is what all logits give, and no program holds them all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from maverick_jax.sharding.dispatch import Stats
from maverick_jax.training import logits as pieces
from maverick_jax.training.logits import log_probabilities, over_pieces, piece_length
from maverick_jax.training.next_token import unevenness
from oracle.plain import plain_model

B, T, V = 2, 24, 64


def loss(model, hidden, target):
    return over_pieces(model, hidden, log_probabilities, target).mean()


@pytest.mark.parametrize("room", [B * V * T, B * V * 8, 1])
def test_pieces_of_any_size(monkeypatch, room):
    """Values and gradients as optax's cross-entropy of all logits."""
    monkeypatch.setattr(pieces, "PIECE", room)
    model = plain_model()
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((B, T, 16), np.float32))
    target = jnp.asarray(random.integers(0, V, (B, T)), jnp.int32)
    value, gradient = jax.jit(jax.value_and_grad(lambda h: loss(model, h, target)))(hidden)
    expected, expected_gradient = jax.value_and_grad(
        lambda h: -optax.softmax_cross_entropy_with_integer_labels(model.logits(h), target).mean()
    )(hidden)
    assert_allclose(value, expected, rtol=1e-6)
    assert_allclose(gradient, expected_gradient, atol=1e-6, rtol=0)


def test_no_program_holds_all_logits(monkeypatch):
    """Forward and backward: the largest array with the vocabulary in it is one piece's."""
    monkeypatch.setattr(pieces, "PIECE", B * V * 4)
    model = plain_model()
    hidden, target = jnp.zeros((B, T, 16)), jnp.zeros((B, T), jnp.int32)
    text = jax.jit(jax.grad(lambda h: loss(model, h, target))).lower(hidden).compile().as_text()
    assert f"f32[{B},4,{V}]" in text or f"f32[{B * 4},{V}]" in text
    assert f"{B},{T},{V}]" not in text
    assert f"[{B * T},{V}]" not in text


def test_length_of_pieces():
    """A divisor of the row, as long as there is room for."""
    assert piece_length(1, 8192, 202048) == 512
    assert piece_length(1, 100, 10) == 100
    assert piece_length(1, 7, pieces.PIECE) == 1


def test_unevenness():
    """1 where all experts have as much to do, E where one has all."""
    even = Stats(jnp.int32(0), jnp.array([2, 2, 2, 2]), jnp.array([0, 1, 2, 3] * 2), jnp.zeros((8, 4)))
    assert_allclose(unevenness([even]), 1.0, rtol=1e-6)
    scores = jnp.full((8, 4), -30.0).at[:, 1].set(30.0)
    one = Stats(jnp.int32(0), jnp.array([0, 8, 0, 0]), jnp.ones(8, jnp.int32), scores)
    assert_allclose(unevenness([one, even]), 2.5, rtol=1e-6)
