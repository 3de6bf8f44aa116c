"""The model computes what transformers computes: float32, eager, on the same weights, text and pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from maverick_jax.model.attention import Piece
from maverick_jax.model.llama4 import Llama4
from oracle.forward import TOLERANCE, logits, text_ids
from oracle.pair import picture_prompt


def test_text_over_three_chunks(tiny):
    """53 tokens span three whole chunks of 16 and six temperature steps: chunk masks, NoPE layers and temperature all show."""
    ids = text_ids(2, 53)
    assert_allclose(logits(tiny.model, ids), tiny.expected_logits(ids), atol=TOLERANCE, rtol=0)


def test_pictures_of_seven_tiles_and_of_one(tiny):
    """Image features land on their tokens, tile after tile, picture after picture, amid text that crosses chunks."""
    ids, tiles = picture_prompt()
    assert_allclose(logits(tiny.model, ids, tiles), tiny.expected_logits(ids, tiles), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("lengths", [(53, 17), (1, 30)])
def test_right_padded_rows_are_as_if_alone(tiny, lengths):
    """Padding neither moves a row's positions and chunk borders nor is it seen or routed, whatever ids it holds."""
    ids = text_ids(2, 53, seed=1)
    padded = logits(tiny.model, ids, lengths=lengths)
    for row, length in enumerate(lengths):
        assert_allclose(padded[row, :length], tiny.expected_logits(ids[row : row + 1, :length])[0], atol=TOLERANCE, rtol=0)


def test_hidden_states_of_every_layer(tiny):
    """A fault is in the first layer whose output differs, not somewhere before the logits."""
    ids = text_ids(1, 53)

    @jax.jit
    def states(model, ids):
        piece = Piece.of(jnp.zeros((1,), jnp.int32), jnp.full((1,), 53, jnp.int32), 53)
        x, outputs = model.embed(ids), []
        for layer in model.text.layers:
            outputs.append(x)
            x, _, _ = layer(x, piece, None)
        return [*outputs, model.hidden(model.embed(ids))[0]]

    expected = tiny.expected(ids, output_hidden_states=True).hidden_states
    ours = states(tiny.model, ids)
    assert len(ours) == len(expected)
    for layer, (x, reference) in enumerate(zip(ours, expected, strict=True)):
        assert_allclose(
            np.asarray(x), reference.numpy(), atol=TOLERANCE, rtol=0, err_msg=f"input of layer {layer} (the last: normed output)"
        )


def test_vision_tower(tiny_maverick):
    """Patches, class token last, two-dimensional RoPE, pixel shuffle and adapter: features of every tile, before the projector."""
    _, tiles = picture_prompt()
    with torch.no_grad():
        expected = tiny_maverick.reference.vision_model(torch.tensor(tiles)).last_hidden_state.numpy()
    features = np.asarray(jax.jit(lambda model, tiles: model.vision(tiles))(tiny_maverick.model, tiles))
    assert_allclose(features.reshape(expected.shape), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("tiles_given", [0, 7, 9])
def test_tiles_and_patch_tokens_must_agree(tiny_maverick, monkeypatch, tiles_given):
    """Too few tiles would silently shift every later picture's features."""
    monkeypatch.setattr(Llama4, "encode_tiles", lambda self, tiles: jnp.zeros((4 * tiles.shape[0], 160)))
    ids, _ = picture_prompt()
    with pytest.raises(ValueError, match=rf"32 <\|patch\|> tokens, the tiles make {4 * tiles_given} image features"):
        tiny_maverick.model(jnp.asarray(ids), jnp.zeros((tiles_given, 3, 56, 56)) if tiles_given else None)
