"""The names of the weights: one table, a row per kind of tensor, read in both directions.

A row pairs our parameter with the stored tensor that holds it and spells the axes of both. Parentheses merge axes and
`k/n` is part k of n, counted from 0, so "E D (0/2 F)" is the first half of the last axis, and "(H d) D" against our "D H d" is torch's
[out, in] matrix with its heads merged.

Axes: V vocabulary, D model width, H query heads, K key/value heads, d head size, F feed-forward width, E experts,
C pixels of a patch, P patches and the class token, A and B the adapter's widths.
Source: transformers' `modeling_llama4.py`; spec section 5.1.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.model import get_abstract_model, parameter_name

BLOCK = 32 << 20  # bytes; larger where one row, such as an expert's matrix, is larger

Index = tuple[slice, ...]
Shape = tuple[int, ...]


class Row(NamedTuple):
    """One kind of tensor; `{i}` stands for a layer."""

    ours: str
    axes: str
    stored: str
    stored_axes: str


# fmt: off
_SECTIONS = (  # (our prefix, Hugging Face's prefix, rows without the prefixes)
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
        ("feed_forward.experts.gate",  "E D F", "feed_forward.experts.gate_up_proj",            "E D (0/2 F)"),
        ("feed_forward.experts.up",    "E D F", "feed_forward.experts.gate_up_proj",            "E D (1/2 F)"),
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
# fmt: on

TABLE = tuple(
    Row(ours + name, axes, theirs + stored, stored_axes) for ours, theirs, rows in _SECTIONS for name, axes, stored, stored_axes in rows
)
_BY_OURS = {row.ours: row for row in TABLE}


@dataclasses.dataclass(frozen=True)
class Place:
    """One parameter as it lies in its stored tensor.

    Attributes:
      tensor: name of the stored tensor.
      shape: ours.
      stored_shape: of the whole stored tensor.
      file_shape: the same with no axes merged, [E, D, 2, F] for the experts' gate.
      order: our axis at each axis of `file_shape`; None where only one part of it is ours.
      part: which one.
    """

    tensor: str
    shape: Shape
    stored_shape: Shape
    file_shape: Shape
    order: tuple[int | None, ...]
    part: int

    @classmethod
    def of(cls, row: Row, shape: Shape, tensor: str) -> Place:
        """The place of a parameter with this shape, of the kind that `row` describes."""
        axes = row.axes.split()
        size: dict[str, int] = dict(zip(axes, shape, strict=True))
        tokens, part = re.findall(r"[\w/]+", row.stored_axes), 0
        for token in tokens:
            if "/" in token:
                part, size[token] = map(int, token.split("/"))
        groups = re.findall(r"\(.*?\)|\S+", row.stored_axes)
        return cls(
            tensor=tensor,
            shape=shape,
            stored_shape=tuple(math.prod(size[token] for token in re.findall(r"[\w/]+", group)) for group in groups),
            file_shape=tuple(size[token] for token in tokens),
            order=tuple(axes.index(token) if token in axes else None for token in tokens),
            part=part,
        )

    def box(self, index: Index) -> Index:
        """Our index as ranges on the axes of `file_shape`."""
        part = slice(self.part, self.part + 1)
        return tuple(part if axis is None else slice(*index[axis].indices(self.shape[axis])[:2]) for axis in self.order)

    def in_file_order(self, array: np.ndarray) -> np.ndarray:
        """A view of (a slice of) our array whose axes are those of `file_shape`."""
        view = array.transpose([axis for axis in self.order if axis is not None])
        return np.expand_dims(view, [i for i, axis in enumerate(self.order) if axis is None])

    def chunk_shape(self, itemsize: int) -> Shape:
        """Shape of the slices in which we read and write: whole rows of the stored tensor, `BLOCK` bytes or one row."""
        split = self.order[0]
        assert split is not None, "no tensor has its parts on the first axis"
        size = self.shape[split]
        pieces = min(size, -(-math.prod(self.shape) * itemsize // BLOCK))
        return tuple(-(-size // pieces) if axis == split else n for axis, n in enumerate(self.shape))


def chunk_indices(shape: Shape, chunk: Shape) -> list[Index]:
    """The index of every chunk, in C order."""
    ranges = ([slice(at, min(at + step, size)) for at in range(0, size, step)] for size, step in zip(shape, chunk, strict=True))
    return list(itertools.product(*ranges))


def find_places(config: Config) -> dict[str, Place]:
    """Our name -> place of every parameter of the model, in the model's order."""
    state = nnx.to_flat_state(nnx.state(get_abstract_model(config)))
    return {name: _find(name, leaf.shape, config) for name, leaf in ((parameter_name(path), leaf) for path, leaf in state)}


def _find(name: str, shape: Shape, config: Config) -> Place:
    layer = re.search(r"\.(\d+)\.", name)
    row = _BY_OURS[re.sub(r"\.\d+\.", ".{i}.", name)]
    tensor = row.stored.format(i=layer and layer[1])
    if config.vision is None:  # Llama4ForCausalLM, with no model around the language model
        tensor = tensor.removeprefix("language_model.")
    return Place.of(row, shape, tensor)


def compare_names(directory: Path, found: Collection[str], expected: Collection[str]) -> None:
    """Refuse a directory that lacks a tensor or has one too many."""
    for names, what in ((set(expected) - set(found), "lacks"), (set(found) - set(expected), "has the unexpected")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{directory} {what} {some}: config.json and weights belong to different models.")


def group_by_tensor(places: dict[str, Place]) -> dict[str, list[str]]:
    """Stored tensor -> our parameters in it: one, or the gate and up of the experts."""
    tensors: dict[str, list[str]] = {}
    for name, place in places.items():
        tensors.setdefault(place.tensor, []).append(name)
    return tensors
