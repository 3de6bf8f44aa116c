"""Meta's `.pth` files as a source: any number of model-parallel ranks, fused or un-fused, bfloat16 or FP8 with files of scales."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from maverick_jax.config import Config
from maverick_jax.convert.formats import agreement, names, torch_file
from maverick_jax.convert.formats.names import Row, kind_of, layer_of
from maverick_jax.convert.formats.places import Place, Shape
from maverick_jax.convert.formats.shards import check_names
from maverick_jax.convert.formats.source import Piece, Source
from maverick_jax.convert.formats.spelling import META, Spelling, read_spelling
from maverick_jax.convert.formats.tensor_file import Tensor
from maverick_jax.errors import UserError
from maverick_jax.ops.quantize import FORMATS

FILES, SCALES = "consolidated.*.pth", "fp8_scales_*.pt"
FP8 = FORMATS["fp8"].values
WIDTHS = {  # the weight that shows it on its first axis
    "vocab_size": "text.embedding",
    "intermediate_size_mlp": "text.layers.{i}.feed_forward.gate",
    "intermediate_size": "text.layers.{i}.feed_forward.shared.gate",
}
EMBEDDING = "tok_embeddings.weight"
LAYERS = ("layers.{i}.", "vision_embeddings.vision_encoder.transformer.resblocks.{i}.")
NO_WEIGHTS = re.compile(r"(.*\.)?(_extra_state|rope\.freqs|(global|running)_gate_stats_3E|expert_activation_DE)")  # of training and caches


def open_meta(directory: Path, config: Config) -> Source:
    """Open the files that Meta releases, and check from their indexes alone that they are whole and that they are one model's.

    Widths are those of the tensors: `params.json` only implies them (spec section 5.3).

    Raises:
      UserError: a rank is missing, a file holds more than tensors, or tensors and `params.json` disagree.
    """
    spellings = [read_file_names(file) for file in _files(directory, FILES)]
    ranks, spelling = [some.tensors for some in spellings], spellings[0]
    if ranks[0].keys() != ranks[-1].keys() or any(rank.keys() != ranks[0].keys() for rank in ranks):
        odd = sorted(set.union(*map(set, ranks)) - set.intersection(*map(set, ranks)))
        raise UserError(f"{directory}: {odd[0]} is in some of the {len(ranks)} {FILES} and not in all: fetch them again.")
    if any(re.search(r"int4", file.name) for file in directory.glob("*.pt")):
        raise UserError(f"{directory} is Meta's int4 checkpoint, which is not supported: use the bfloat16 or the FP8 one.")
    scales = [torch_file.read_index(file) for file in _files(directory, SCALES)] if any(directory.glob(SCALES)) else []
    if scales and len(scales) != len(ranks):
        raise UserError(f"{directory} has {len(ranks)} files {FILES} but {len(scales)} files {SCALES}: fetch what is missing.")
    agreement.compare_layers(directory, config, ranks[0], LAYERS, spell=spelling.spell)
    config = _with_widths(config, ranks)
    pieces, expected, fp8 = {}, set(), False
    for name, (shape, _, _) in names.weights(config).items():
        row = _choose(name, ranks[0])
        stored = row.stored.format(i=layer_of(name))
        expected.add(stored)
        if stored not in ranks[0]:
            continue
        quantized = ranks[0][stored].dtype == FP8
        fp8 |= quantized
        pieces[f"{name}.values" if quantized else name] = _pieces(row, stored, shape, ranks, config)
        if quantized:
            pieces[f"{name}.scales"] = _scales(directory, name, shape, scales, config)
    agreement.compare_names(directory, ranks[0], expected, spell=spelling.spell)
    pieces = {
        leaf: [piece._replace(stored=spelling.stored.get(piece.stored, piece.stored)) for piece in parts] for leaf, parts in pieces.items()
    }
    return Source(directory, f"Meta {'FP8 ' if fp8 else ''}.pth, {len(ranks)} ranks", config, pieces, spelling.notes)


def read_file_names(file: Path) -> Spelling:
    """The tensors of a file by the names of our tables, without those of training and caches; no weights are read."""
    tensors = torch_file.read_index(file, without=NO_WEIGHTS)
    check_names(file, tensors)
    return read_spelling(file, tensors, META)


def _files(directory: Path, pattern: str) -> list[Path]:
    """The files of all ranks in order; a hole in their numbers is a file that was not fetched."""
    numbers = {int(found[-1]): file for file in directory.glob(pattern) if (found := re.findall(r"\d+", file.name))}
    if not numbers:
        raise UserError(f"{directory} has no files {pattern}: fetch them under the names that they were released with.")
    if (missing := next(n for n in range(len(numbers) + 1) if n not in numbers)) < len(numbers):
        raise UserError(f"{directory} lacks the file of rank {missing} ({pattern}): fetch it too.")
    return [numbers[n] for n in sorted(numbers)]


def _with_widths(config: Config, ranks: list[dict[str, Tensor]]) -> Config:
    """The config with vocabulary, feed-forward widths and dtype as the tensors have them."""
    widths = {}
    for field, kind in WIDTHS.items():
        for row in names.META:
            pattern = re.escape(row.stored).replace(r"\{i\}", r"\d+")
            found = [tensor for name, tensor in ranks[0].items() if row.ours == kind and re.fullmatch(pattern, name) and tensor.shape]
            if found:
                widths[field] = found[0].shape[0] * len(ranks) // row.stored_axes.split()[0].count(row.ranks)
    dtypes = [tensor.dtype.name for name, tensor in ranks[0].items() if name == EMBEDDING]
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **widths), dtype=(*dtypes, config.dtype)[0])


def _choose(name: str, tensors: dict[str, Tensor]) -> Row:
    """The row, among the spellings of a weight, whose tensor is there; where there is none, the first."""
    rows = [row for row in names.META if row.ours == kind_of(name)]
    return next((row for row in rows if row.stored.format(i=layer_of(name)) in tensors), rows[0])


def _pieces(row: Row, stored: str, shape: Shape, ranks: list[dict[str, Tensor]], config: Config) -> list[Piece]:
    sizes = {"H": config.text.num_attention_heads, "K": config.text.num_key_value_heads}
    count = len(ranks) if row.ranks else 1  # what is not divided is the same in all files
    if row.ranks and shape[row.axes.split().index(row.ranks)] % count:
        raise UserError(f"{stored} is not divided evenly by {count} files: some are missing, or params.json is another model's.")
    return [
        Piece(stored, tensors[stored], Place.of(row.axes, shape, row.stored_axes, sizes=sizes, ranks=row.ranks, rank=rank, of=count))
        for rank, tensors in enumerate(ranks[:count])
    ]


def _scales(directory: Path, name: str, shape: Shape, scales: list[dict[str, Tensor]], config: Config) -> list[Piece]:
    row = next((row for row in names.META_FP8 if row.ours == f"{kind_of(name)}.scales"), None)
    stored = row.stored.format(i=layer_of(name)) if row else name
    if row is None or not all(stored in rank for rank in scales) or not scales:
        raise UserError(f"{directory} has FP8 values of {name} but no scale {stored} in {SCALES}: fetch the checkpoint again.")
    groups = len(scales) if row.ranks == "G" else 1
    return _pieces(row, stored, (shape[0], groups, shape[2]), scales, config)
