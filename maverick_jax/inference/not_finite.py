"""Where NaN or infinity comes from: what gave logits that are not finite is computed again, and every layer's output looked at.

Shape suffixes: N tiles, S pixels, T tokens of a piece (of one row), I image features, L stages.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maverick_jax.inference.cache import KVCache, new_cache
from maverick_jax.inference.sizes import PIECES, next_power_of_two, round_up_context
from maverick_jax.model import Llama4, parameter_name
from maverick_jax.model.attention import Piece
from maverick_jax.model.inputs import Array
from maverick_jax.ops.linear import linear
from maverick_jax.ops.norm import rms_norm


def explain(model: Llama4, ids_T: np.ndarray, index_T: np.ndarray, features_ID: jax.Array | None, tiles: Array | None) -> str:
    """What is wrong and what to do, for a row whose logits are not finite.

    Args:
      ids_T: the row's tokens, the new ones included.
      index_T: which feature each `<|patch|>` token takes.
      features_ID: made of `tiles`, for all rows.
    """
    stage = None
    if features_ID is not None and tiles is not None and not _all_finite(features_ID):
        stage = _first_of_vision(model, tiles)
    stage = stage or _first_of_text(model, ids_T, index_T, features_ID)
    if stage is None:
        return "every layer's output is when the row is read alone: run it again."
    found = f"{stage} is the first layer whose output is not"
    weight = _damaged_weight(model, stage)
    narrow = model.text.embedding.dtype == jnp.float16
    if weight is None and narrow:
        return f"{found}; float16 holds no number beyond 65504: load the model with dtype 'bfloat16'."
    why = f"its weight {weight} holds NaN or infinity" if weight else "its numbers are too large"
    instead = ", or load the model with dtype 'bfloat16'" if narrow else ""
    return f"{found}; {why}: fetch or convert the checkpoint again (`maverick verify` names what is damaged){instead}."


def _first_of_vision(model: Llama4, tiles: Array) -> str | None:
    layers = [f"vision.layers.{i}" for i in range(len(model.vision.layers))]
    stages = ["vision.patch_embedding", *layers, "vision.adapter", "projector"]
    graphdef, weights = nnx.split(model)
    found = (_first(stages, _through_vision(graphdef, weights, np.asarray(tile, np.float32)[None])) for tile in tiles)
    return next((stage for stage in found if stage), None)


def _first_of_text(model, ids_T, index_T, features_ID) -> str | None:
    layers = [f"text.layers.{i}" for i in range(len(model.text.layers))]
    stages = ["text.embedding", *layers, "text.norm", "text.unembedding"]
    graphdef, weights = nnx.split(model)
    dtype = jnp.dtype(model.text.embedding.dtype)
    cache = new_cache(model.config.text, 1, round_up_context(len(ids_T)), dtype, model.constrain)
    for start in range(0, len(ids_T), PIECES[-1]):
        part = slice(start, start + PIECES[-1])
        ids_1T, index_1T = np.zeros((2, 1, max(PIECES[0], next_power_of_two(len(ids_T[part])))), np.int32)
        length = len(ids_T[part])
        ids_1T[0, :length], index_1T[0, :length] = ids_T[part], index_T[part]
        cache, finite_L = _through_text(graphdef, weights, cache, ids_1T, np.array([length], np.int32), features_ID, index_1T)
        stage = _first(stages, finite_L)
        if stage:
            return stage
    return None


@functools.partial(jax.jit, static_argnums=0)
def _through_vision(graphdef, weights, tiles_N3SS) -> jax.Array:
    """[L] bool: is the output of every stage finite?"""
    model = nnx.merge(graphdef, weights)
    outputs = [model.vision.embed(tiles_N3SS)]
    for layer in model.vision.layers:
        outputs.append(layer(outputs[-1]))
    outputs.append(model.vision.adapt(outputs[-1]))
    outputs.append(linear(outputs[-1], model.projector[...]))
    return _finite(outputs, model)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _through_text(graphdef, weights, cache, ids_1T, lengths_1, features_ID, index_1T) -> tuple[KVCache, jax.Array]:
    """The cache behind a piece, and [L] bool as for vision. Padding counts: NaN of its own reaches the tokens before it."""
    model = nnx.merge(graphdef, weights)
    piece = Piece.of(cache.lengths_B, lengths_1, ids_1T.shape[1])
    outputs, layers = [model.embed(ids_1T, features_ID, index_1T)], []
    for layer, rows in zip(model.text.layers, cache.rows(), strict=True):
        output, rows, _ = layer(outputs[-1], piece, rows)
        outputs.append(output)
        layers.append(rows)
    last = rms_norm(piece.pick_last(outputs[-1]), model.text.norm[...], model.text.eps)
    return cache.advanced(layers, piece.end_B), _finite([*outputs, last, model.logits(last)], model)


def _finite(outputs, model) -> jax.Array:
    return model.constrain(jnp.stack([jnp.isfinite(x).all() for x in outputs]), (None,))


def _first(stages: list[str], finite_L: jax.Array) -> str | None:
    return next((stage for stage, finite in zip(stages, np.asarray(finite_L), strict=True) if not finite), None)


def _damaged_weight(model: Llama4, stage: str) -> str | None:
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = parameter_name(path)
        if f"{name}.".startswith(f"{stage}.") and not _all_finite(leaf[...]):
            return name
    return None


_all_finite = jax.jit(lambda x: jnp.isfinite(x).all())
