"""Any Llama 4, not only the releases: random small configurations agree with transformers."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
from numpy.testing import assert_allclose

from oracle.forward import TOLERANCE, logits, text_ids
from oracle.pair import Pair
from oracle.port import port
from oracle.tiny_checkpoints import PATCH, make_config, make_model

TOKENS_PER_TILE = {28: 1, 56: 4}


@st.composite
def configurations(draw):
    """Keyword arguments of a small text and vision config."""
    layers = draw(st.integers(1, 3))
    kv_heads = draw(st.integers(1, 3))
    scaled = draw(st.booleans())
    rope = {"rope_type": "default", "rope_theta": draw(st.sampled_from([1e4, 5e5]))}
    if scaled:
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": draw(st.sampled_from([1.0, 4.0]))}
        rope |= {"original_max_position_embeddings": 64}
    text = dict(
        hidden_size=draw(st.sampled_from([32, 48])),
        intermediate_size=draw(st.sampled_from([16, 40])),
        intermediate_size_mlp=24,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * draw(st.integers(1, 4)),
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16])),
        num_local_experts=draw(st.integers(1, 130)),
        interleave_moe_layer_step=draw(st.integers(1, 3)),
        no_rope_layers=draw(st.lists(st.sampled_from([0, 1]), min_size=layers, max_size=layers)),
        use_qk_norm=draw(st.booleans()),
        attention_chunk_size=draw(st.integers(2, 40)),
        attn_temperature_tuning=draw(st.booleans()),
        floor_scale=draw(st.integers(1, 12)),
        rope_parameters=rope,
    )
    vision = dict(image_size=draw(st.sampled_from(list(TOKENS_PER_TILE))), num_hidden_layers=1)
    return text, vision


@hypothesis.settings(max_examples=12, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(configurations(), st.integers(0, 3), st.integers(1, 40), st.integers(0, 9))
def test_random_configurations_agree(configuration, tiles, words, seed):
    """A size, a switch or a pattern is wired to the wrong place, though the releases' values hide it."""
    text, vision = configuration
    config = make_config(text=text, vision=vision)
    reference = make_model(config, seed=seed)
    pair = Pair(reference, port(reference))
    patches = tiles * TOKENS_PER_TILE[vision["image_size"]]
    ids = text_ids(1, words + patches, seed)
    ids[0, words // 2 : words // 2 + patches] = PATCH
    side = vision["image_size"]
    pixels = np.random.default_rng(seed).uniform(-1, 1, (tiles, 3, side, side)).astype(np.float32) if tiles else None
    assert_allclose(logits(pair.model, ids, pixels), pair.expected_logits(ids, pixels), atol=TOLERANCE, rtol=0)
