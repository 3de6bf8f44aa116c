"""Does our model compute with a model directory what transformers computes with the checkpoint? Stage by stage, in float32.

Both sides run their own modules with weights that are read when the computation reaches them: one matrix of transformers', one
feed-forward of ours, one routed expert at a time, and of these only the ones that a token is routed to.

Shape suffixes: B batch, T tokens (of one row; in the vision stage image features), D width, V vocabulary, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from maverick_jax.config import Config
from maverick_jax.convert.model_directory import ModelDirectory, open_model_directory
from maverick_jax.convert.names import weights
from maverick_jax.convert.places import Index
from maverick_jax.convert.recognize import open_source
from maverick_jax.errors import UserError
from maverick_jax.model import get_abstract_model, parameter_name
from maverick_jax.model.attention import Piece
from maverick_jax.ops.linear import linear_float32
from maverick_jax.ops.norm import rms_norm
from maverick_jax.ops.quantize import QuantizedArray, Shape, Weight
from maverick_jax.ops.swiglu import ExpertWeights, grouped_swiglu
from maverick_jax.sharding.dispatch import Stats

TOLERANCE = 1e-4  # see `Comparison.agrees`
TILES, WORDS = 2, 48
LOGITS_AT_ONCE = 4096  # of the vocabulary
LONG_CHUNK = 1024  # tokens; a prompt goes beyond chunks that are shorter
FEWEST_ROWS = 16


class State(NamedTuple):
    """What one side holds after a stage.

    Attributes:
      stage: "vision", "embedding", "layer 0" and so on, "logits".
      values: [T, width] float32.
      expert_T: the expert that a layer sent each token to; None where there are none.
    """

    stage: str
    values: np.ndarray
    expert_T: np.ndarray | None = None


class Row(NamedTuple):
    """A stage of ours beside the reference's.

    Attributes:
      error: the largest difference.
      largest: the largest magnitude of the reference.
      relative: of the tokens' largest difference over the reference's largest magnitude in that token, the largest.
      routing: the share of tokens that went to the same expert; None where there are none.
    """

    stage: str
    error: float
    largest: float
    relative: float
    routing: float | None

    @classmethod
    def of(cls, ours: State, reference: State) -> Row:
        assert (ours.stage, ours.values.shape) == (reference.stage, reference.values.shape)
        pairs = zip(ours.values, reference.values, strict=True)  # token by token: no copies of the logits
        with np.errstate(invalid="ignore"):  # infinite minus infinite
            error_T, largest_T = np.array([(np.abs(a - b).max(), np.abs(b).max()) for a, b in pairs]).T
        routing = None
        if ours.expert_T is not None:
            routing = float((ours.expert_T == reference.expert_T).mean())
        relative = (error_T / np.maximum(largest_T, np.finfo(np.float32).tiny)).max()
        return cls(ours.stage, float(error_T.max()), float(largest_T.max()), float(relative), routing)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row per stage, in the order of the computation."""

    rows: tuple[Row, ...]

    @property
    def worst(self) -> Row:
        """The stage with the largest relative error."""
        return max(self.rows, key=lambda row: math.inf if math.isnan(row.relative) else row.relative)

    @property
    def agrees(self) -> bool:
        """Whether no stage's relative error is above `TOLERANCE`.

        Relative to the token's own largest magnitude: whatever reads a hidden state divides it by its root mean square first, so
        a difference counts by the size of the vector that it is in. Some tokens' are a thousand times the others', and would
        hide these if there were one scale for all.
        """
        return all(row.relative <= TOLERANCE for row in self.rows)  # false for what is no number

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"agrees": self.agrees, "tolerance": TOLERANCE, "stages": [row._asdict() for row in self.rows]}

    def as_table(self) -> str:
        """Aligned columns, a line per stage."""
        head = ("stage", "max error", "largest", "relative", "same expert")
        body = [
            (r.stage, f"{r.error:.1e}", f"{r.largest:.3g}", f"{r.relative:.1e}", "" if r.routing is None else f"{r.routing:.1%}")
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = ["  ".join([f"{s:<{widths[0]}}", *(f"{n:>{w}}" for n, w in zip(ns, widths[1:], strict=True))]) for s, *ns in (head, *body)]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def compare(model_dir: str | Path, source_dir: str | Path, *, progress: bool = True) -> Comparison:
    """Run a prompt with a picture through our model and through transformers', and compare what they hold after every stage.

    Each side goes on with its own values, so errors add up as in use. Where the model directory's weights are not the checkpoint's
    own, but quantized or rounded, the table says what that does.

    Args:
      model_dir: a finished model directory.
      source_dir: the Hugging Face directory that it was made from: bfloat16, or the official FP8.
      progress: show a bar on stderr.

    Raises:
      UserError: PyTorch or transformers is not installed, or the directories are none of the above, or of different models.
    """
    source_dir = Path(source_dir)
    if any(source_dir.glob("*.pth")) and not any(source_dir.glob("*.safetensors")):
        raise UserError(
            f"{source_dir} holds Meta's .pth files: comparing with transformers takes a Hugging Face directory of the same model."
        )
    try:
        from maverick_jax.convert.compare_reference import Reference
    except ImportError as error:
        raise UserError(f"comparing with transformers takes PyTorch: pip install 'maverick-jax[torch]' transformers ({error}).") from error
    model = open_model_directory(model_dir)
    _refuse_another_model(model, source_dir)
    prompt = make_prompt(model.config)
    sides = zip(Ours(model).run(prompt), Reference(source_dir).run(prompt), strict=True)
    stages = model.config.text.num_hidden_layers + 2 + (prompt.tiles is not None)
    bar = tqdm(sides, "against transformers", stages, unit="stage", disable=not progress, dynamic_ncols=True)
    with jax.default_device(_cpu()), jax.default_matmul_precision("highest"):
        return Comparison(tuple(Row.of(*pair) for pair in bar))


def _refuse_another_model(model: ModelDirectory, source_dir: Path) -> None:
    configs = (model.config, open_source(source_dir).config)
    ours, theirs = ({name: weight.shape for name, weight in weights(config).items()} for config in configs)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            shapes = f"{name} is {ours.get(name, 'not there')} here and {theirs.get(name, 'not there')} there"
            raise UserError(f"{model.directory} and {source_dir} are different models: {shapes}.")


def _cpu() -> jax.Device:
    """Where float32 products are float32 products, and the host's memory is the device's."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError(f"the comparison runs on the CPU, which JAX_PLATFORMS leaves out ({error}): unset it.") from error


class Prompt(NamedTuple):
    """Attributes: ids [1, T] int32, tiles [N, C, S, S] float32 or None."""

    ids: np.ndarray
    tiles: np.ndarray | None


def make_prompt(config: Config) -> Prompt:
    """Ordinary tokens, around the tiles of a picture if the model sees; the same every time. Longer than a chunk that is short."""
    generator, text, vision = np.random.default_rng(0), config.text, config.vision
    chunk = text.attention_chunk_size or 0
    count = WORDS + (chunk if chunk <= LONG_CHUNK else 0)
    special = {*config.eos_token_id, config.bos_token_id, config.pad_token_id, config.image_token_index}
    end = min((i for i in special if text.vocab_size // 2 < i < text.vocab_size), default=text.vocab_size)
    words = generator.choice(np.setdiff1d(np.arange(end), list(special)), count + TILES).tolist()
    if vision is None:
        return Prompt(np.array([words], np.int32), None)
    block = [id for tile in range(TILES) for id in (words.pop(), *[config.image_token_index] * vision.tokens_per_tile)]
    ids = [*words[: count // 2], *block, *words[count // 2 :]]
    tiles = generator.uniform(-1, 1, (TILES, vision.num_channels, vision.image_size, vision.image_size)).astype(np.float32)
    return Prompt(np.array([ids], np.int32), tiles)


class Ours:
    """Our model, whose parameters stay on disk until its code asks for them."""

    def __init__(self, directory: ModelDirectory):
        self.dispatcher = OneByOne()
        self.directory, self.model = directory, get_abstract_model(directory.config, dtype="float32", dispatcher=self.dispatcher)
        for path, leaf in nnx.to_flat_state(nnx.state(self.model, nnx.Param)):
            parent: Any = self.model
            for part in path[:-1]:
                parent = parent[part] if isinstance(part, int) else getattr(parent, part)
            kind = Experts if "experts" in path else Table if path == ("text", "embedding") else Stored
            setattr(parent, path[-1], kind(directory, parameter_name(path), leaf.shape))

    def run(self, prompt: Prompt) -> Iterator[State]:
        """As `Llama4.__call__`, with a look at what it holds in between."""
        model, ids_BT, features = self.model, jnp.asarray(prompt.ids), None
        if prompt.tiles is not None:
            features = model.encode_tiles(prompt.tiles)
            yield State("vision", np.asarray(features))
        x_BTD = model.embed(ids_BT, features, jnp.cumsum(ids_BT == model.config.image_token_index, axis=1) - 1)
        yield State("embedding", np.asarray(x_BTD[0]))
        T = prompt.ids.shape[1]
        piece = Piece.of(jnp.zeros(1, jnp.int32), jnp.full(1, T, jnp.int32), T)
        for i, layer in enumerate(model.text.layers):
            x_BTD, _, stats = layer(x_BTD, piece, None)
            yield State(f"layer {i}", np.asarray(x_BTD[0]), None if stats is None else self.dispatcher.expert_T)
        yield State("logits", self._logits(rms_norm(x_BTD, model.text.norm[...], model.text.eps)[0]))

    def _logits(self, x_TD: jax.Array) -> np.ndarray:
        table: Any = self.model.text.unembedding
        D, V = table.shape
        logits_TV = np.empty((len(x_TD), V), np.float32)
        for at in range(0, V, LOGITS_AT_ONCE):
            part = slice(at, min(at + LOGITS_AT_ONCE, V))
            logits_TV[:, part] = linear_float32(x_TD, table.read((slice(0, D), part)))
        return logits_TV


class Stored:
    """In the place of a parameter: `weight[...]` reads it."""

    dtype = jnp.dtype("float32")

    def __init__(self, directory: ModelDirectory, name: str, shape: Shape):
        self.directory, self.name, self.shape = directory, name, shape

    def __getitem__(self, index: Any) -> Any:
        return self.read()

    def read(self, at: Sequence[slice] = ()) -> Weight:
        """A part of the weight: `at` the first axes, all of the others. Float32, or quantized as it is stored."""
        leaves = [leaf for leaf in (self.name, f"{self.name}.values", f"{self.name}.scales") if leaf in self.directory.parameters]
        arrays = []
        for leaf in leaves:
            shape, _ = self.directory.parameters[leaf]
            index: Index = (*at, *(slice(0, size) for size in shape[len(at) :]))
            arrays.append(jnp.asarray(self.directory.read(leaf, index)))
        return arrays[0].astype(self.dtype) if len(arrays) == 1 else QuantizedArray(*arrays)


class Experts(Stored):
    """In the place of a stack of experts, which nobody reads whole."""

    def __getitem__(self, index: Any) -> Experts:
        return self

    def one(self, expert: int) -> Weight:
        """[1, ...]."""
        return self.read((slice(expert, expert + 1),))


class Table(Stored):
    """In the place of the embedding: `table[...][ids]` reads these rows, one at a time."""

    def __getitem__(self, index: Any) -> Any:
        if index is ...:
            return self
        ids, where = np.unique(np.asarray(index), return_inverse=True)
        return jnp.concatenate([self.read((slice(row, row + 1),)) for row in ids.tolist()])[where.reshape(index.shape)]


_grouped_swiglu = jax.jit(grouped_swiglu)


def _through_expert(x_RD: jax.Array, expert: int, experts: ExpertWeights) -> np.ndarray:
    """[R, D] rows through an expert, which is let go of when this returns."""
    R = len(x_RD)
    padded = jnp.pad(x_RD, ((0, max(FEWEST_ROWS, 1 << (R - 1).bit_length()) - R), (0, 0)))  # few different sizes are few programs
    weights = ExpertWeights(*(stack.one(expert) for stack in cast(Iterable[Experts], experts)))
    return np.asarray(_grouped_swiglu(padded, weights, jnp.array([R], jnp.int32)))[:R]


class OneByOne:
    """A dispatcher with one expert in memory: each token through its expert, an expert at a time.

    Attributes:
      expert_T: where it sent the tokens last.
    """

    expert_T: np.ndarray

    def __call__(self, x_TD: jax.Array, expert_T: jax.Array, experts: ExpertWeights) -> tuple[jax.Array, Stats]:
        self.expert_T = np.asarray(expert_T)
        y_TD, load_E = np.zeros(x_TD.shape, np.float32), np.bincount(self.expert_T, minlength=experts.gate_EDF.shape[0])
        for expert in np.flatnonzero(load_E):
            rows = np.flatnonzero(self.expert_T == expert)
            y_TD[rows] = _through_expert(x_TD[rows], int(expert), experts)
        return jnp.asarray(y_TD), Stats(jnp.zeros((), jnp.int32), jnp.asarray(load_E, jnp.int32))
