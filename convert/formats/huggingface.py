"""A Hugging Face directory as a source: plain weights, routed experts stacked or one by one, or the official FP8 checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from maverick_jax.config import Config
from maverick_jax.config.huggingface import overridden
from maverick_jax.convert.formats import agreement, names
from maverick_jax.convert.formats.foreign import read_optional
from maverick_jax.convert.formats.names import Row, huggingface_name, layer_of
from maverick_jax.convert.formats.places import Place, Shape
from maverick_jax.convert.formats.quantization import FP8, check_scales
from maverick_jax.convert.formats.shards import left_out, read_tensors
from maverick_jax.convert.formats.source import Piece, Source
from maverick_jax.convert.formats.spelling import Spelling, read_spelling
from maverick_jax.convert.formats.tensor_file import Tensor
from maverick_jax.convert.formats.tied import as_one_table
from maverick_jax.errors import UserError

LAYERS = ("language_model.model.layers.{i}.", "vision_model.model.layers.{i}.")
EXPERT = re.compile(rf"language_model\.model\.layers\.{agreement.NUMBER}\.feed_forward\.experts\.{agreement.NUMBER}\.")
ADAPTER = re.compile(r"\.lora_(embedding_)?[AB]\.")
EMBEDDING, UNEMBEDDING = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def open_huggingface(directory: Path, config: Config) -> Source:
    """Open a Hugging Face checkpoint and check, from the headers alone, that it is whole and that it is `config`'s.

    Raises:
      UserError: a file, tensor or byte is missing; a tensor is unexpected or misshapen, or FP8 where it must not be.
    """
    spelling = read_names(directory)
    if config.text.tie_word_embeddings:
        spelling = as_one_table(directory, spelling, EMBEDDING, UNEMBEDDING)
    tensors = spelling.tensors
    agreement.compare_layers(directory, config, tensors, LAYERS, spell=spelling.spell)
    apart = _find_apart(directory, config, tensors)
    pieces: dict[str, list[Piece]] = {}
    expected, values = set(), set()
    for name, weight in names.weights(config).items():
        for leaf, row, shape, experts in _leaves(name, weight.shape, tensors, apart):
            place = Place.of(row.axes, shape, row.stored_axes)
            stored = {e: huggingface_name(row, name, expert=e) for e in experts}
            expected |= set(stored.values())
            if leaf.endswith(".values"):
                values |= set(stored.values())
            pieces[leaf] = [Piece(spelling.stored[t], tensors[t], place.at(0, e)) for e, t in stored.items() if t in tensors]
    check_scales(directory, spelling, values)
    if expected ^ tensors.keys() == {UNEMBEDDING}:
        raise UserError(f"{directory} has no unembedding (lm_head.weight): Llama4TextModel alone has none; save the model around it.")
    agreement.compare_names(directory, tensors, expected, spell=spelling.spell)
    kind = "Hugging Face FP8" if values else "Hugging Face, experts one by one" if apart else "Hugging Face"
    return Source(directory, kind, config, pieces, (*spelling.notes, *overridden(read_optional(directory / "config.json"))))


def read_names(directory: Path) -> Spelling:
    """Every tensor of a directory by the names of our tables; no weights are read."""
    tensors = read_tensors(directory)
    if adapter := next(filter(ADAPTER.search, tensors), ""):
        raise UserError(f"{directory} holds an adapter beside the weights that it changes ({adapter}): merge it into them first.")
    spelling = read_spelling(directory, tensors)
    others = left_out(directory, tensors)
    notes = [f"left out, for they are no part of the model: {agreement.some_of(others)}."] if others else []
    return dataclasses.replace(spelling, notes=(*spelling.notes, *notes))


def _find_apart(directory: Path, config: Config, tensors: Collection[str]) -> set[str]:
    """The layers whose routed experts are stored one by one."""
    found = [match for name in tensors if (match := EXPERT.match(name))]
    if found:
        agreement.compare_experts(directory, config, {int(match[2]) for match in found})
    return {match[1] for match in found}


def _leaves(name: str, shape: Shape, tensors: dict[str, Tensor], apart: set[str]) -> Iterator[tuple[str, Row, Shape, range]]:
    """Our leaves of a weight with their rows, shapes and stored parts: itself, or values and scales where experts one by one are FP8."""
    plain, row, scales = names.plain_row(name), names.one_by_one_row(name), names.one_by_one_row(f"{name}.scales")
    if row is None or scales is None or layer_of(name) not in apart or huggingface_name(plain, name) in tensors:
        yield name, plain, shape, range(1)
        return
    experts = range(shape[0])
    stored = [tensors[t].dtype for e in experts if (t := huggingface_name(row, name, expert=e)) in tensors]
    if FP8 not in stored:
        yield name, row, shape, experts
        return
    yield f"{name}.values", row, shape, experts
    yield f"{name}.scales", scales, (shape[0], 1, shape[2]), experts
