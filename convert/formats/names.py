"""The names of the weights: a row per kind of tensor, read in both directions.

A row pairs our parameter with the stored tensor that holds it and spells the axes of both (`places` reads the spelling). `{i}` is
a layer, `{e}` an expert.

Axes: V vocabulary, D model width, H query heads, K key/value heads, d head size, F feed-forward width, E experts,
C pixels of a patch, P patches and the class token, A and B the adapter's widths, G groups of inputs that share a scale.
Sources: transformers' `modeling_llama4.py`; Llama 4 reference, `models/llama4/`; spec section 5.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from flax import nnx

from maverick_jax.config import Config
from maverick_jax.convert.formats.places import Place, Shape
from maverick_jax.model import get_abstract_model, parameter_name
from maverick_jax.model.parameter import Sides
from maverick_jax.model.quantized import component


class Row(NamedTuple):
    """One kind of tensor. `ranks` is the axis that is divided among files, one per rank of model parallelism."""

    ours: str
    axes: str
    stored: str
    stored_axes: str
    ranks: str = ""


# fmt: off
_HUGGINGFACE = (  # (our prefix, theirs, rows without the prefixes)
    ("text.", "language_model.", (
        ("embedding",                  "V D",   "model.embed_tokens.weight",                    "V D"),
        ("norm",                       "D",     "model.norm.weight",                            "D"),
        ("unembedding",                "D V",   "lm_head.weight",                               "V D"),
    )),
    ("text.layers.{i}.", "language_model.model.layers.{i}.", (
        ("attention_norm",             "D",     "input_layernorm.weight",                       "D"),
        ("attention.query",            "D H d", "self_attn.q_proj.weight",                      "(H d) D"),
        ("attention.key",              "D K d", "self_attn.k_proj.weight",                      "(K d) D"),
        ("attention.value",            "D K d", "self_attn.v_proj.weight",                      "(K d) D"),
        ("attention.output",           "H d D", "self_attn.o_proj.weight",                      "D (H d)"),
        ("feed_forward_norm",          "D",     "post_attention_layernorm.weight",              "D"),
        ("feed_forward.gate",          "D F",   "feed_forward.gate_proj.weight",                "F D"),
        ("feed_forward.up",            "D F",   "feed_forward.up_proj.weight",                  "F D"),
        ("feed_forward.down",          "F D",   "feed_forward.down_proj.weight",                "D F"),
        ("feed_forward.router",        "D E",   "feed_forward.router.weight",                   "E D"),
        ("feed_forward.experts.gate",  "E D F", "feed_forward.experts.gate_up_proj",            "E D [F]+F"  ),
        ("feed_forward.experts.up",    "E D F", "feed_forward.experts.gate_up_proj",            "E D F+[F]"  ),
        ("feed_forward.experts.down",  "E F D", "feed_forward.experts.down_proj",               "E F D"),
        ("feed_forward.shared.gate",   "D F",   "feed_forward.shared_expert.gate_proj.weight",  "F D"),
        ("feed_forward.shared.up",     "D F",   "feed_forward.shared_expert.up_proj.weight",    "F D"),
        ("feed_forward.shared.down",   "F D",   "feed_forward.shared_expert.down_proj.weight",  "D F"),
    )),
    ("vision.", "vision_model.", (
        ("patch_embedding",            "C D",   "patch_embedding.linear.weight",                "D C"),
        ("class_embedding",            "D",     "class_embedding",                              "D"),
        ("position_embedding",         "P D",   "positional_embedding_vlm",                     "P D"),
        ("pre_norm.scale",             "D",     "layernorm_pre.weight",                         "D"),
        ("pre_norm.bias",              "D",     "layernorm_pre.bias",                           "D"),
        ("post_norm.scale",            "D",     "layernorm_post.weight",                        "D"),
        ("post_norm.bias",             "D",     "layernorm_post.bias",                          "D"),
        ("adapter.up",                 "A B",   "vision_adapter.mlp.fc1.weight",                "B A"),
        ("adapter.down",               "A B",   "vision_adapter.mlp.fc2.weight",                "B A"),
    )),
    ("vision.layers.{i}.", "vision_model.model.layers.{i}.", (
        ("attention_norm.scale",       "D",     "input_layernorm.weight",                       "D"),
        ("attention_norm.bias",        "D",     "input_layernorm.bias",                         "D"),
        ("attention.query",            "D H d", "self_attn.q_proj.weight",                      "(H d) D"),
        ("attention.query_bias",       "H d",   "self_attn.q_proj.bias",                        "(H d)"),
        ("attention.key",              "D H d", "self_attn.k_proj.weight",                      "(H d) D"),
        ("attention.key_bias",         "H d",   "self_attn.k_proj.bias",                        "(H d)"),
        ("attention.value",            "D H d", "self_attn.v_proj.weight",                      "(H d) D"),
        ("attention.value_bias",       "H d",   "self_attn.v_proj.bias",                        "(H d)"),
        ("attention.output",           "H d D", "self_attn.o_proj.weight",                      "D (H d)"),
        ("attention.output_bias",      "D",     "self_attn.o_proj.bias",                        "D"),
        ("feed_forward_norm.scale",    "D",     "post_attention_layernorm.weight",              "D"),
        ("feed_forward_norm.bias",     "D",     "post_attention_layernorm.bias",                "D"),
        ("feed_forward.up",            "D F",   "mlp.fc1.weight",                               "F D"),
        ("feed_forward.up_bias",       "F",     "mlp.fc1.bias",                                 "F"),
        ("feed_forward.down",          "F D",   "mlp.fc2.weight",                               "D F"),
        ("feed_forward.down_bias",     "D",     "mlp.fc2.bias",                                 "D"),
    )),
    ("", "", (
        ("projector",                  "B D",   "multi_modal_projector.linear_1.weight",        "D B"),
    )),
)
# Meta's `.pth` files. Where a row is there twice, the second spelling is that of the module after its load hooks.
_META = (
    ("text.", "", (
        ("embedding",                  "V D",   "tok_embeddings.weight",                        "V D",          "V"),
        ("norm",                       "D",     "norm.weight",                                  "D"),
        ("unembedding",                "D V",   "output.weight",                                "V D",          "V"),
    )),
    ("text.layers.{i}.", "layers.{i}.", (
        ("attention_norm",             "D",     "attention.wqkv.layer_norm_weight",             "D"),
        ("attention_norm",             "D",     "attention_norm.weight",                        "D"),
        ("attention.query",            "D H d", "attention.wqkv.weight",                        "([H]+K+K d) D", "H"),
        ("attention.query",            "D H d", "attention.wq.weight",                          "(H d) D",      "H"),
        ("attention.key",              "D K d", "attention.wqkv.weight",                        "(H+[K]+K d) D", "K"),
        ("attention.key",              "D K d", "attention.wk.weight",                          "(K d) D",      "K"),
        ("attention.value",            "D K d", "attention.wqkv.weight",                        "(H+K+[K] d) D", "K"),
        ("attention.value",            "D K d", "attention.wv.weight",                          "(K d) D",      "K"),
        ("attention.output",           "H d D", "attention.wo.weight",                          "D (H d)",      "H"),
        ("feed_forward_norm",          "D",     "feed_forward.norm.weight",                     "D"),
        ("feed_forward_norm",          "D",     "feed_forward.mlp.layer_norm_weight",           "D"),
        ("feed_forward_norm",          "D",     "ffn_norm.weight",                              "D"),
        ("feed_forward.gate",          "D F",   "feed_forward.mlp.fc1_weight",                  "[F]+F D",      "F"),
        ("feed_forward.gate",          "D F",   "feed_forward.w1.weight",                       "F D",          "F"),
        ("feed_forward.up",            "D F",   "feed_forward.mlp.fc1_weight",                  "F+[F] D",      "F"),
        ("feed_forward.up",            "D F",   "feed_forward.w3.weight",                       "F D",          "F"),
        ("feed_forward.down",          "F D",   "feed_forward.mlp.fc2_weight",                  "D F",          "F"),
        ("feed_forward.down",          "F D",   "feed_forward.w2.weight",                       "D F",          "F"),
        ("feed_forward.router",        "D E",   "feed_forward.router_DE",                       "D E"),
        ("feed_forward.experts.gate",  "E D F", "feed_forward.experts.moe_w_in_eD_F",           "(E D) F",      "F"),
        ("feed_forward.experts.gate",  "E D F", "feed_forward.experts.w1",                      "E D F",        "F"),
        ("feed_forward.experts.up",    "E D F", "feed_forward.experts.moe_w_swiglu_eD_F",       "(E D) F",      "F"),
        ("feed_forward.experts.up",    "E D F", "feed_forward.experts.w3",                      "E D F",        "F"),
        ("feed_forward.experts.down",  "E F D", "feed_forward.experts.moe_w_out_eF_D",          "(E F) D",      "F"),
        ("feed_forward.experts.down",  "E F D", "feed_forward.experts.w2",                      "E F D",        "F"),
        ("feed_forward.shared.gate",   "D F",   "feed_forward.w_in_shared_FD.weight",           "F D",          "F"),
        ("feed_forward.shared.gate",   "D F",   "feed_forward.shared_expert.w1.weight",         "F D",          "F"),
        ("feed_forward.shared.up",     "D F",   "feed_forward.w_swiglu_FD.weight",              "F D",          "F"),
        ("feed_forward.shared.up",     "D F",   "feed_forward.shared_expert.w3.weight",         "F D",          "F"),
        ("feed_forward.shared.down",   "F D",   "feed_forward.w_out_shared_DF.weight",          "D F",          "F"),
        ("feed_forward.shared.down",   "F D",   "feed_forward.shared_expert.w2.weight",         "D F",          "F"),
    )),
    ("vision.", "vision_embeddings.", (
        ("patch_embedding",            "C D",   "vision_encoder.conv1._linear.weight",          "D C",          "D"),
        ("class_embedding",            "D",     "vision_encoder.class_embedding",               "D"),
        ("position_embedding",         "P D",   "vision_encoder.positional_embedding_vlm",      "P D"),
        ("pre_norm.scale",             "D",     "vision_encoder.ln_pre.weight",                 "D"),
        ("pre_norm.bias",              "D",     "vision_encoder.ln_pre.bias",                   "D"),
        ("post_norm.scale",            "D",     "vision_encoder.ln_post.weight",                "D"),
        ("post_norm.bias",             "D",     "vision_encoder.ln_post.bias",                  "D"),
        ("adapter.up",                 "A B",   "vision_adapter.mlp.c_fc.weight",               "B A",          "B"),
        ("adapter.down",               "A B",   "vision_adapter.mlp.c_proj.weight",             "B A",          "A"),
    )),
    ("vision.layers.{i}.", "vision_embeddings.vision_encoder.transformer.resblocks.{i}.", (
        ("attention_norm.scale",       "D",     "ln_1.weight",                                  "D"),
        ("attention_norm.bias",        "D",     "ln_1.bias",                                    "D"),
        ("attention.query",            "D H d", "attn.wq.weight",                               "(H d) D",      "H"),
        ("attention.query_bias",       "H d",   "attn.wq.bias",                                 "(H d)",        "H"),
        ("attention.key",              "D H d", "attn.wk.weight",                               "(H d) D",      "H"),
        ("attention.key_bias",         "H d",   "attn.wk.bias",                                 "(H d)",        "H"),
        ("attention.value",            "D H d", "attn.wv.weight",                               "(H d) D",      "H"),
        ("attention.value_bias",       "H d",   "attn.wv.bias",                                 "(H d)",        "H"),
        ("attention.output",           "H d D", "attn.wo.weight",                               "D (H d)",      "H"),
        ("attention.output_bias",      "D",     "attn.wo.bias",                                 "D"),
        ("feed_forward_norm.scale",    "D",     "ln_2.weight",                                  "D"),
        ("feed_forward_norm.bias",     "D",     "ln_2.bias",                                    "D"),
        ("feed_forward.up",            "D F",   "mlp.c_fc.weight",                              "F D",          "F"),
        ("feed_forward.up_bias",       "F",     "mlp.c_fc.bias",                                "F",            "F"),
        ("feed_forward.down",          "F D",   "mlp.c_proj.weight",                            "D F",          "F"),
        ("feed_forward.down_bias",     "D",     "mlp.c_proj.bias",                              "D"),
    )),
    ("", "", (
        ("projector",                  "B D",   "vision_projection.weight",                     "D B",          "D"),
    )),
)
# Routed experts one by one, as they are before they are stacked: in the official FP8 checkpoint, where each has a scale per output
# channel (the first row of a part then holds its values), and plain from compressors and trainers that take every matrix by itself.
_ONE_BY_ONE = (
    ("text.layers.{i}.feed_forward.experts.", "language_model.model.layers.{i}.feed_forward.experts.{e}.", (
        ("gate",                       "E D F", "gate_proj.weight",                             "F D"),
        ("gate.scales",                "E G F", "gate_proj.weight_scale",                       "F G"),
        ("up",                         "E D F", "up_proj.weight",                               "F D"),
        ("up.scales",                  "E G F", "up_proj.weight_scale",                         "F G"),
        ("down",                       "E F D", "down_proj.weight",                             "D F"),
        ("down.scales",                "E G D", "down_proj.weight_scale",                       "D G"),
    )),
)
# Scales of Meta's FP8 checkpoint, in files of their own. `down` is divided along its inputs: every rank is a group.
_META_FP8 = (
    ("text.layers.{i}.feed_forward.experts.", "layers.{i}.feed_forward.experts.", (
        ("gate.scales",                "E G F", "w1",                                           "E G F",        "F"),
        ("up.scales",                  "E G F", "w3",                                           "E G F",        "F"),
        ("down.scales",                "E G D", "w2",                                           "E G D",        "G"),
    )),
)
# fmt: on


def _rows(sections) -> tuple[Row, ...]:
    return tuple(Row(ours + name, axes, theirs + stored, *rest) for ours, theirs, rows in sections for name, axes, stored, *rest in rows)


HUGGINGFACE, ONE_BY_ONE, META, META_FP8 = map(_rows, (_HUGGINGFACE, _ONE_BY_ONE, _META, _META_FP8))
_BY_OURS, _EXPERTS = ({row.ours: row for row in rows} for rows in (HUGGINGFACE, ONE_BY_ONE))


def kind_of(name: str) -> str:
    """`text.layers.3.attention.query` -> `text.layers.{i}.attention.query`, as the tables call it."""
    return re.sub(r"\.\d+\.", ".{i}.", name)


def layer_of(name: str) -> str:
    """`text.layers.3.attention.query` -> `3`; empty outside the layers."""
    found = re.search(r"\.(\d+)\.", name)
    return found[1] if found else ""


class Weight(NamedTuple):
    """What the model declares of a weight: `sides` says which axes are inputs, None where it is no matrix of a product."""

    shape: Shape
    sides: Sides | None
    component: str | None


@functools.lru_cache
def weights(config: Config) -> dict[str, Weight]:
    """Every weight of the model by name, in the model's order."""
    state = nnx.to_flat_state(nnx.state(get_abstract_model(config)))
    return {parameter_name(path): Weight(leaf.shape, leaf.get_metadata().get("sides"), component(path)) for path, leaf in state}


def find_places(config: Config) -> dict[str, tuple[str, Place]]:
    """Our name -> Hugging Face's name of its tensor, and the place in it, of every weight of the model in its own order."""
    found = {}
    for name, weight in weights(config).items():
        row = plain_row(name)
        found[name] = (huggingface_name(row, name, prefixed=config.vision is not None), Place.of(row.axes, weight.shape, row.stored_axes))
    return found


def plain_row(name: str) -> Row:
    """Hugging Face's row of one of our weights."""
    return _BY_OURS[kind_of(name)]


def one_by_one_row(leaf: str) -> Row | None:
    """The row of an expert stack, or of its values or scales, where the experts are stored one by one; None for other weights."""
    return _EXPERTS.get(kind_of(leaf).removesuffix(".values"))


def huggingface_name(row: Row, name: str, *, prefixed: bool = True, expert: int = 0) -> str:
    """Hugging Face's name of the tensor of `row` that belongs to our parameter.

    Args:
      prefixed: False for `Llama4ForCausalLM`, which has no model around the language model.
    """
    stored = row.stored.format(i=layer_of(name), e=expert)
    return stored if prefixed else stored.removeprefix("language_model.")
