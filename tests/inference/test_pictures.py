"""Pictures of several requests go through the vision tower together."""

import numpy as np
import pytest

from maverick_jax.inference.engine import Engine
from maverick_jax.inference.request import Request
from oracle.plain import PATCH, SIDE, VISION, plain_model


@pytest.fixture(scope="module")
def model():
    return plain_model(vision=VISION, num_hidden_layers=2)


def test_requests_of_one_call_share_the_tower(model):
    """Three prompts with two pictures each, one of them in all: one run for four tiles, and the answers are those of each alone."""
    tiles = np.random.default_rng(0).uniform(-1, 1, (4, 3, SIDE, SIDE)).astype(np.float32)
    requests = [Request(ids=[5, PATCH, 6 + i, PATCH, 7], tiles=tiles[[0, i]], max_new_tokens=4, stop_ids=()) for i in (1, 2, 3)]
    alone = [Engine(model, slots=1, max_length=64).run([request])[0].tokens for request in requests]
    engine = Engine(model, slots=4, max_length=64)
    features, groups = engine._serving.runner.features, []
    encode = features._encode

    def counted(tiles_N3SS):
        groups.append(len(tiles_N3SS))
        return encode(tiles_N3SS)

    features._encode = counted
    assert [handle.tokens for handle in engine.run(requests)] == alone
    assert groups == [4]
    assert features.encoded == 4
