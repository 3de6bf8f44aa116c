"""At the real chunk of 8,192 tokens the oracle is float64: one layer with RoPE and one without, around the border.

transformers itself is the less exact side there: its float32 inverse frequencies turn position 8,191 by a wrong angle.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from maverick_jax.inference.cache import KVCache
from maverick_jax.model import Llama4
from oracle.forward import TOLERANCE, cached_step
from oracle.plain import plain_model

CHUNK, BORDER = 8192, 8192
LENGTH = BORDER + 24
SIZES = dict(
    num_hidden_layers=1,
    moe_layers=(),
    hidden_size=256,
    intermediate_size_mlp=64,
    head_dim=128,
    num_attention_heads=2,
    num_key_value_heads=1,
    attention_chunk_size=CHUNK,
    floor_scale=8192,
    max_position_embeddings=2 * CHUNK,
)
ASKED = np.array([0, 1, 100, 4095, 8000, *range(BORDER - 12, LENGTH)])  # temperature begins at 8,191, the new chunk at 8,192


@pytest.fixture(scope="module", params=["rope", "nope"])
def model(request) -> Llama4:
    return plain_model(**SIZES, nope_layers=() if request.param == "rope" else (0,))


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(1, 64, (1, LENGTH)).astype(np.int32)


def exact(model: Llama4, ids_T: np.ndarray) -> np.ndarray:
    """[asked, V] logits in float64, by the definitions of the specification: no chunk is a row, no block a partial sum."""
    text, layer = model.text, model.text.layers[0]
    H, K, d = SIZES["num_attention_heads"], SIZES["num_key_value_heads"], SIZES["head_dim"]
    positions = np.arange(len(ids_T))

    def weight(parameter):
        return np.asarray(parameter[...], np.float64)

    def norm(x, parameter):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.text.rms_norm_eps) * weight(parameter)

    def turned(x_THd, positions):
        angles = positions[:, None, None] * 500000.0 ** (-np.arange(0, d, 2) / d)
        pairs = x_THd.reshape(*x_THd.shape[:-1], -1, 2)
        turn = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
        return np.stack([turn.real, turn.imag], axis=-1).reshape(x_THd.shape)

    x_TD = weight(text.embedding)[ids_T]
    normed = norm(x_TD, layer.attention_norm)
    query, key, value = (
        np.einsum("td,dhk->thk", normed, weight(w)) for w in (layer.attention.query, layer.attention.key, layer.attention.value)
    )
    query = query[ASKED]
    seen = positions[None, :] <= ASKED[:, None]
    if model.config.text.nope_layers:
        query *= (1 + 0.1 * np.log(np.floor((ASKED + 1) / 8192) + 1))[:, None, None]
    else:
        query, key = turned(query, ASKED), turned(key, positions)
        seen &= positions[None, :] // CHUNK == ASKED[:, None] // CHUNK
    scores = np.einsum("tkgd,skd->kgts", query.reshape(len(ASKED), K, H // K, d), key) / np.sqrt(d)
    weights = np.exp(np.where(seen, scores - scores.max(-1, keepdims=True), -np.inf))
    mixed = np.einsum("kgts,skd->tkgd", weights / weights.sum(-1, keepdims=True), value).reshape(len(ASKED), H, d)
    x_TD = x_TD[ASKED] + np.einsum("thd,hdm->tm", mixed, weight(layer.attention.output))
    normed = norm(x_TD, layer.feed_forward_norm)
    gate = normed @ weight(layer.feed_forward.gate)
    x_TD = x_TD + (gate / (1 + np.exp(-gate)) * (normed @ weight(layer.feed_forward.up))) @ weight(layer.feed_forward.down)
    return norm(x_TD, text.norm) @ weight(text.unembedding)


@pytest.fixture(scope="module")
def expected(model, ids) -> np.ndarray:
    return exact(model, ids[0])


def test_all_at_once(model, ids, expected):
    """Two chunks in one call, as a prefill computes them. Measured: 1.9e-5 before the border, 2.6e-6 after it; without RoPE 3.5e-6."""
    ours = np.asarray(jax.jit(lambda model, ids: model(ids))(model, ids))[0, ASKED]
    assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)


def test_pieces_and_single_tokens_across_the_border(model, ids, expected):
    """Through the cache: a long piece, one that ends before the border, then token by token over it, then another piece."""
    cache, parts, start = KVCache.create(model.config.text, 1, LENGTH, jnp.float32), [], 0
    for size in (BORDER - 12, *[1] * 20, 16):
        part, cache = cached_step(model, ids[:, start : start + size], jnp.full((1,), size, jnp.int32), cache)
        parts.append(np.asarray(part)[0])
        start += size
    assert start == LENGTH
    assert_allclose(np.concatenate(parts)[ASKED], expected, atol=TOLERANCE, rtol=0)
