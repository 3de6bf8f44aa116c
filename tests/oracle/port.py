"""transformers' weights in our model, by a table of names of its own: it knows nothing of `maverick_jax.convert`.

A leaf takes the named tensor, transposed where torch stores [out, in], and reshaped to the leaf's heads.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.sharding import Mesh

from maverick_jax.config import Config
from maverick_jax.model import Llama4, get_abstract_model, parameter_name
from maverick_jax.sharding import THROUGHPUT, AttendOnMesh, Constrain, Layout, make_dispatcher

TEXT, VISION = "language_model.model.", "vision_model."
TEXT_LAYER, VISION_LAYER = TEXT + r"layers.\1.", VISION + r"model.layers.\1."

NAMES = [  # (ours, transformers', what to do with it)
    (r"text\.embedding", TEXT + "embed_tokens.weight", "keep"),
    (r"text\.norm", TEXT + "norm.weight", "keep"),
    (r"text\.unembedding", "language_model.lm_head.weight", "transpose"),
    (r"text\.layers\.(\d+)\.attention_norm", TEXT_LAYER + "input_layernorm.weight", "keep"),
    (r"text\.layers\.(\d+)\.attention\.(q|k|v|o)\w+", TEXT_LAYER + r"self_attn.\2_proj.weight", "transpose"),
    (r"text\.layers\.(\d+)\.feed_forward_norm", TEXT_LAYER + "post_attention_layernorm.weight", "keep"),
    (r"text\.layers\.(\d+)\.feed_forward\.(gate|up|down)", TEXT_LAYER + r"feed_forward.\2_proj.weight", "transpose"),
    (r"text\.layers\.(\d+)\.feed_forward\.router", TEXT_LAYER + "feed_forward.router.weight", "transpose"),
    (r"text\.layers\.(\d+)\.feed_forward\.experts\.gate", TEXT_LAYER + "feed_forward.experts.gate_up_proj", "first half"),
    (r"text\.layers\.(\d+)\.feed_forward\.experts\.up", TEXT_LAYER + "feed_forward.experts.gate_up_proj", "second half"),
    (r"text\.layers\.(\d+)\.feed_forward\.experts\.down", TEXT_LAYER + "feed_forward.experts.down_proj", "keep"),
    (r"text\.layers\.(\d+)\.feed_forward\.shared\.(\w+)", TEXT_LAYER + r"feed_forward.shared_expert.\2_proj.weight", "transpose"),
    (r"projector", "multi_modal_projector.linear_1.weight", "transpose"),
    (r"vision\.patch_embedding", VISION + "patch_embedding.linear.weight", "transpose"),
    (r"vision\.class_embedding", VISION + "class_embedding", "keep"),
    (r"vision\.position_embedding", VISION + "positional_embedding_vlm", "keep"),
    (r"vision\.(pre|post)_norm\.scale", VISION + r"layernorm_\1.weight", "keep"),
    (r"vision\.(pre|post)_norm\.bias", VISION + r"layernorm_\1.bias", "keep"),
    (r"vision\.adapter\.up", VISION + "vision_adapter.mlp.fc1.weight", "transpose"),
    (r"vision\.adapter\.down", VISION + "vision_adapter.mlp.fc2.weight", "transpose"),
    (r"vision\.layers\.(\d+)\.attention_norm\.scale", VISION_LAYER + "input_layernorm.weight", "keep"),
    (r"vision\.layers\.(\d+)\.attention_norm\.bias", VISION_LAYER + "input_layernorm.bias", "keep"),
    (r"vision\.layers\.(\d+)\.feed_forward_norm\.scale", VISION_LAYER + "post_attention_layernorm.weight", "keep"),
    (r"vision\.layers\.(\d+)\.feed_forward_norm\.bias", VISION_LAYER + "post_attention_layernorm.bias", "keep"),
    (r"vision\.layers\.(\d+)\.attention\.(q|k|v|o)[a-z]+", VISION_LAYER + r"self_attn.\2_proj.weight", "transpose"),
    (r"vision\.layers\.(\d+)\.attention\.(q|k|v|o)[a-z]+_bias", VISION_LAYER + r"self_attn.\2_proj.bias", "keep"),
    (r"vision\.layers\.(\d+)\.feed_forward\.up", VISION_LAYER + "mlp.fc1.weight", "transpose"),
    (r"vision\.layers\.(\d+)\.feed_forward\.up_bias", VISION_LAYER + "mlp.fc1.bias", "keep"),
    (r"vision\.layers\.(\d+)\.feed_forward\.down", VISION_LAYER + "mlp.fc2.weight", "transpose"),
    (r"vision\.layers\.(\d+)\.feed_forward\.down_bias", VISION_LAYER + "mlp.fc2.bias", "keep"),
]


def find(name: str) -> tuple[str, str]:
    """transformers' name of our parameter, and what to do with its tensor."""
    found = [(re.sub(ours, theirs, name), kind) for ours, theirs, kind in NAMES if re.fullmatch(ours, name)]
    assert len(found) == 1, f"{name} has {len(found)} rows in the table"
    return found[0]


def convert(name: str, shape: tuple[int, ...], tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Our parameter `name` from a state dict, in the names of a text-only or of a whole model."""
    theirs, kind = find(name)
    tensor = tensors[theirs if theirs in tensors else theirs.removeprefix("language_model.")]
    half = tensor.shape[-1] // 2
    change = {
        "keep": lambda: tensor,
        "transpose": lambda: tensor.T,
        "first half": lambda: tensor[..., :half],
        "second half": lambda: tensor[..., half:],
    }
    return np.ascontiguousarray(change[kind]()).reshape(shape)


def port(
    reference: torch.nn.Module, config: Config | None = None, *, mesh: Mesh | None = None, layout: Layout = THROUGHPUT, **options: Any
) -> Llama4:
    """Our float32 model with the reference's weights, on one device or laid out over a mesh."""
    config = config or Config.from_huggingface(reference.config.to_dict())
    if mesh is not None:
        options = {
            "constrain": Constrain(mesh, layout),
            "dispatcher": make_dispatcher(mesh, layout),
            "attend": AttendOnMesh(mesh, layout),
        } | options
    graphdef, state = nnx.split(get_abstract_model(config, dtype="float32", **options))
    tensors = {name: tensor.float().numpy() for name, tensor in reference.state_dict().items()}
    for path, leaf in nnx.to_flat_state(state):
        array = jnp.asarray(convert(parameter_name(path), leaf.shape, tensors))
        if mesh is not None:
            array = jax.device_put(array, layout.sharding(leaf.get_metadata()["axes"], leaf.shape, mesh))
        leaf.set_value(array)
    return nnx.merge(graphdef, state)
