"""The mini model beside what transformers said of it, recorded: the proof that needs no PyTorch, on any Python and any jax."""

import jax
import numpy as np
import pytest

import maverick_jax as mj
from oracle import mini

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return dict(np.load(mini.FILE))


@pytest.fixture(scope="module")
def model() -> mj.Llama4:
    return mj.load(dtype="float32")


def test_the_recording_is_what_transformers_says(recorded):
    """An old recording would prove nothing."""
    said = mini.ask_transformers()
    assert said.keys() == recorded.keys()
    for name, values in said.items():
        np.testing.assert_allclose(recorded[name], values, rtol=0, atol=TOLERANCE / 10)


@pytest.mark.parametrize("devices", [1, 8])
def test_logits(devices, model, recorded):
    """Three chunks of text, six steps of the attention temperature, and a question about two pictures."""
    if devices > 1:
        model = mj.load(dtype="float32", mesh=mj.make_mesh(expert=devices))
    text, question, tiles = mini.inputs()
    forward = jax.jit(lambda model, ids, tiles: model(ids, tiles))
    np.testing.assert_allclose(forward(model, text, None)[0], recorded["text_logits"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(forward(model, question, tiles)[0], recorded["picture_logits"], rtol=0, atol=TOLERANCE)


def test_greedy_tokens_with_a_cache(model, recorded):
    """Decoding crosses a border between chunks."""
    text, _, _ = mini.inputs()
    new = mj.generate(model, text.tolist(), max_new_tokens=mini.NEW_TOKENS, stop_ids=())
    assert new == [recorded["new_tokens"].tolist()]
