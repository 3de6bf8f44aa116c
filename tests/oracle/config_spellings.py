"""A tiny `config.json`, flat and nested, and a way to write it otherwise."""

import copy
import functools
from typing import Any

ABSENT = object()
FLAT = dict(  # spelled as transformers 4.51 does; two chunks, three temperature steps, both kinds of feed-forward
    architectures=["Llama4ForCausalLM"],
    model_type="llama4_text",
    vocab_size=48,
    hidden_size=32,
    intermediate_size=16,
    intermediate_size_mlp=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    hidden_act="silu",
    num_local_experts=4,
    num_experts_per_tok=1,
    interleave_moe_layer_step=2,
    no_rope_layers=[],
    use_qk_norm=True,
    attention_chunk_size=8,
    floor_scale=4,
    attn_scale=0.3,
    rms_norm_eps=1e-3,
    rope_theta=100.0,
    rope_scaling=None,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=[2, 3],
    pad_token_id=0,
    torch_dtype="bfloat16",
    tie_word_embeddings=False,
)
VISION = dict(
    model_type="llama4_vision_model", hidden_act="gelu", hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    image_size=56, patch_size=14, num_channels=3, vision_output_dim=24, projector_input_dim=24, projector_output_dim=24,
    pixel_shuffle_ratio=0.5, rope_theta=50.0,
)  # fmt: skip
NESTED = dict(model_type="llama4", image_token_index=40, torch_dtype="bfloat16", text_config=FLAT, vision_config=VISION)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0, original_max_position_embeddings=16)


def write(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the fields changed that dotted names such as "text_config.head_dim" name."""
    values = copy.deepcopy(base)
    for name, value in changes.items():
        *path, last = name.split(".")
        part = functools.reduce(dict.__getitem__, path, values)
        part[last] = value
        if value is ABSENT:
            del part[last]
    return values
