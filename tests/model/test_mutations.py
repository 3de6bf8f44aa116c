"""The parity tests can fail: each fault that a port of Llama 4 is known to have moves the logits far beyond the tolerance.

Measured on these weights in transformers itself (spec section 7) every fault below changes logits by 2.5 or more.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maverick_jax.config import TextConfig
from maverick_jax.model import attention, moe
from maverick_jax.sharding import Local
from oracle.forward import TOLERANCE, text_ids
from oracle.port import port

VISIBLE = 1e-2  # a hundred times the tolerance: a mutation is never mistaken for rounding


def half_rotation(monkeypatch, reference):
    """RoPE on pairs (j, j + d/2), as Llama 2 and 3 checkpoints of transformers want it."""

    def rotate(x, angles):
        a, b = jnp.split(x, 2, axis=-1)
        cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    monkeypatch.setattr(attention, "rotate", rotate)
    return port(reference)


def chunk_mask_on_nope_layers(monkeypatch, reference):
    """The chunk belongs to the layers with RoPE alone."""
    monkeypatch.setattr(TextConfig, "chunk_of_layer", lambda self, layer: self.attention_chunk_size)
    return port(reference)


def no_chunk_mask(monkeypatch, reference):
    """Full attention everywhere, the fault of most engines past 8,192 tokens."""
    monkeypatch.setattr(TextConfig, "chunk_of_layer", lambda self, layer: None)
    return port(reference)


def no_temperature(monkeypatch, reference):
    """Invisible in short tests: the factor is 1 below `floor_scale - 1`."""
    model = port(reference)
    config = dataclasses.replace(model.config, text=dataclasses.replace(model.config.text, attn_temperature_tuning=False))
    return port(reference, config)


class ScoreOnTheOutput:
    """A router and dispatcher that multiply the expert's output by the score, as most other mixtures do."""

    def __call__(self, x_TD, expert_T, experts):
        y_TD, stats = Local()(x_TD, expert_T, experts)
        return y_TD * self.score_T[:, None], stats

    def route(self, scores_TE, real_T):
        self.score_T = jax.nn.sigmoid(scores_TE.max(axis=-1))
        return jnp.ones_like(self.score_T), jnp.argmax(scores_TE, axis=-1).astype(jnp.int32)


def score_on_the_output(monkeypatch, reference):
    """SwiGLU is not linear: scaling what comes out is another function than scaling what goes in."""
    mutation = ScoreOnTheOutput()
    monkeypatch.setattr(moe, "route", mutation.route)
    return port(reference, dispatcher=mutation)


def swapped_gate_and_up(monkeypatch, reference):
    """The fused tensor holds the gates in its first half."""
    model = port(reference)
    for layer in model.config.text.moe_layers:
        experts = model.text.layers[layer].feed_forward.experts
        experts.gate, experts.up = experts.up, experts.gate
    return model


def no_fault(monkeypatch, reference):
    return port(reference)


def difference(pair, model):
    ids = text_ids(1, 53)
    ours = jax.jit(lambda ids: model(ids))(ids)  # a program of its own: the mutation is traced, not found in a cache
    return np.abs(np.asarray(ours) - pair.expected_logits(ids)).max()


@pytest.mark.parametrize(
    "mutate", [half_rotation, chunk_mask_on_nope_layers, no_chunk_mask, no_temperature, score_on_the_output, swapped_gate_and_up]
)
def test_parity_catches(tiny_maverick, monkeypatch, mutate):
    """If this fails, the parity test cannot see the fault."""
    assert difference(tiny_maverick, mutate(monkeypatch, tiny_maverick.reference)) > VISIBLE


def test_without_a_fault_nothing_is_caught(tiny_maverick, monkeypatch):
    """The comparison above is sound: it stays within the tolerance where nothing is wrong."""
    assert difference(tiny_maverick, no_fault(monkeypatch, tiny_maverick.reference)) < TOLERANCE
