"""Our model with the weights of a model directory, stage by stage: one side of `compare`.

Every module is our own. In the place of its parameters stands what reads them when the module's code asks for them, and the
dispatcher sends the tokens to one expert after the other: in memory are the weights of one attention or one feed-forward, or of
one routed expert, and of these only the ones that a token is sent to.

Shape suffixes: B batch, T tokens, R rows, D model width, F feed-forward width, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maverick_jax.convert.build.model_directory import ModelDirectory
from maverick_jax.convert.formats.places import Index
from maverick_jax.convert.proof.compare.stages import LOGITS_AT_ONCE, Prompt, State
from maverick_jax.model import get_abstract_model, parameter_name
from maverick_jax.model.attention import Piece
from maverick_jax.ops.linear import linear_float32
from maverick_jax.ops.norm import rms_norm
from maverick_jax.ops.quantize import QuantizedArray, Shape, Weight
from maverick_jax.ops.swiglu import ExpertWeights, grouped_swiglu
from maverick_jax.sharding.dispatch import Stats

FEWEST_ROWS = 16


class Ours:
    """Our model, whose parameters stay on disk until its code asks for them."""

    def __init__(self, directory: ModelDirectory):
        self.dispatcher = OneByOne()
        self.directory, self.model = directory, get_abstract_model(directory.config, dtype="float32", dispatcher=self.dispatcher)
        for path, leaf in nnx.to_flat_state(nnx.state(self.model, nnx.Param)):
            parent: Any = self.model
            for part in path[:-1]:
                parent = parent[part] if isinstance(part, int) else getattr(parent, str(part))
            kind = Experts if "experts" in path else Table if path == ("text", "embedding") else Stored
            setattr(parent, str(path[-1]), kind(directory, parameter_name(path), leaf.shape))

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
        text: Any = self.model.text
        V, D = text.embedding.shape
        logits_TV = np.empty((len(x_TD), V), np.float32)
        for at in range(0, V, LOGITS_AT_ONCE):
            part = slice(at, min(at + LOGITS_AT_ONCE, V))
            columns = text.embedding.read((part,)).T if text.tied else text.unembedding.read((slice(0, D), part))
            logits_TV[:, part] = linear_float32(x_TD, columns)
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
        # Wait: what runs ahead of the computation holds what it has read in stored form and in float32.
        return jax.block_until_ready(arrays[0].astype(self.dtype) if len(arrays) == 1 else QuantizedArray(*arrays))


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
        rows: Any = [self.read((slice(row, row + 1),)) for row in ids.tolist()]
        return jnp.concatenate(rows)[where.reshape(index.shape)]


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
        y_TD, load_E = np.zeros(x_TD.shape, np.float32), np.bincount(self.expert_T, minlength=experts.shape[0])
        for expert in np.flatnonzero(load_E):
            rows = np.flatnonzero(self.expert_T == expert)
            y_TD[rows] = _through_expert(x_TD[rows], int(expert), experts)
        return jnp.asarray(y_TD), Stats(jnp.zeros((), jnp.int32), jnp.asarray(load_E, jnp.int32))
