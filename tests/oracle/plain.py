"""Small models of ours with random weights, for what needs no reference."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from maverick_jax.config import Config, TextConfig, VisionConfig
from maverick_jax.model import Llama4, get_abstract_model

PATCH, SIDE = 60, 28
TEXT = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    intermediate_size_mlp=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_hidden_layers=3,
    num_local_experts=4,
    nope_layers=(1,),
    moe_layers=(1,),
    attention_chunk_size=8,
    floor_scale=4,
    max_position_embeddings=64,
)
VISION = VisionConfig(
    image_size=SIDE,
    hidden_size=16,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    projector_input_dim=16,
    projector_output_dim=16,
    vision_output_dim=16,
)


def plain_config(*, vision: VisionConfig | None = None, **text: Any) -> Config:
    """A dense layer with RoPE, a NoPE layer with experts, another dense one; a tile is one `PATCH` token."""
    return Config(text=TextConfig(**{**TEXT, **text}), vision=vision, image_token_index=PATCH, eos_token_id=(2, 3), dtype="float32")


def plain_model(
    *, dtype: str = "float32", vision: VisionConfig | None = None, options: dict[str, Any] | None = None, **text: Any
) -> Llama4:
    """`options` as for `Llama4`: what a mesh needs. Equal weights for equal arguments."""
    graphdef, state = nnx.split(get_abstract_model(plain_config(vision=vision, **text), dtype=dtype, **(options or {})))
    random = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(state):
        noise = random.standard_normal(leaf.shape, np.float32) / math.sqrt(leaf.shape[0])
        leaf.set_value(jnp.asarray(1 + 0.1 * noise if "norm" in str(path[-2:]) else noise, dtype))
    return nnx.merge(graphdef, state)
