"""What is computed from logits, in pieces of the sequence: [B, T, V] float32 are never in memory, neither forward nor backward.

202,048 logits of one token are 808 kB; of a batch of 64 x 8,192 tokens they would be 423 GB.

Shape suffixes: B rows, T tokens, P pieces, C tokens of a piece, D model width, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from maverick_jax.model import Llama4
from maverick_jax.ops.linear import AdaptedWeight, LowRankArray, base_of, linear_float32
from maverick_jax.ops.quantize import matrix_shape
from maverick_jax.sharding.layout import Constrain, Layout
from maverick_jax.sharding.placement import gather
from maverick_jax.training.batch import Array

PIECE = 2**27  # logits of a piece on one device: 512 MiB in float32. Every piece reads the unembedding, and writes its gradient
Result = TypeVar("Result")


def over_pieces(model: Llama4, hidden_BTD: jax.Array, of_logits: Callable[..., Result], *of_tokens: Any) -> Result:
    """`of_logits(logits_BCV, *parts)` of the whole sequence, piece by piece; a gradient makes each piece's logits again.

    On a mesh every device goes through its own tokens: the unembedding is gathered once, before the first piece, and its gradient summed
    over devices once, after the last.

    Args:
      hidden_BTD: normed hidden states.
      of_logits: float32 logits and the same places of `of_tokens` -> a tree of [B, C, ...].
      of_tokens: trees of [B, T, ...].

    Returns:
      The tree, of [B, T, ...].
    """
    here = functools.partial(_over_pieces, of_logits)
    if not isinstance(model.constrain, Constrain):
        return here(model.text.head, hidden_BTD, *of_tokens)
    mesh, layout = model.constrain.mesh, model.constrain.layout
    tokens = PartitionSpec(*_token_axes(mesh, layout, *hidden_BTD.shape[:2]))
    head_DV = model.text.head
    embed, vocab = layout.split(("table_embed", "vocab"), (hidden_BTD.shape[2], model.config.text.vocab_size), mesh)
    of_head = PartitionSpec(embed, vocab)
    if isinstance(head_DV, LowRankArray):
        of_head = dataclasses.replace(head_DV, base=of_head, a=PartitionSpec(embed), b=PartitionSpec(None, vocab))

    def on_device(head_DV, hidden_BTD, *of_tokens):
        return here(jax.tree.map(gather, head_DV, of_head), hidden_BTD, *of_tokens)

    return jax.shard_map(on_device, mesh=mesh, in_specs=(of_head, tokens, *[tokens] * len(of_tokens)), out_specs=tokens, check_vma=False)(
        head_DV, hidden_BTD, *of_tokens
    )


def _token_axes(mesh: Mesh, layout: Layout, B: int, T: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes that divide rows and sequence: those of the layout, and of the others as many as divide the sequence too."""
    rows, sequence = layout.split(("batch", "sequence"), (B, T), mesh)
    for axis in mesh.axis_names:
        if axis not in (*rows, *sequence) and T % math.prod(mesh.shape[name] for name in (*sequence, axis)) == 0:
            sequence = (*sequence, axis)
    return rows, sequence


def _over_pieces(of_logits, head_DV: AdaptedWeight, hidden_BTD, *of_tokens):
    B, T, _ = hidden_BTD.shape
    C = piece_length(B, T, matrix_shape(base_of(head_DV))[-1])

    @jax.checkpoint
    def piece(parts):
        hidden_BCD, *rest = parts
        return of_logits(linear_float32(hidden_BCD, head_DV), *rest)

    inputs = (hidden_BTD, *of_tokens)
    if C == T:
        return piece(inputs)
    cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(B, T // C, C, *x.shape[2:]), 1, 0), inputs)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), lax.map(piece, cut))


def piece_length(B: int, T: int, V: int) -> int:
    """Tokens of a row in a piece: the most that divide T evenly and stay below `PIECE`."""
    return next((T // pieces for pieces in range(1, T) if T % pieces == 0 and B * (T // pieces) * V <= PIECE), 1)


def log_probabilities(logits_BCV: jax.Array, target_BC: jax.Array) -> jax.Array:
    """[B, C] log-probability of each target, whatever axis of the mesh divides the vocabulary."""
    is_target_BCV = jnp.arange(logits_BCV.shape[-1])[None, None, :] == target_BC[..., None]
    return jnp.where(is_target_BCV, logits_BCV, 0).sum(axis=-1) - jax.nn.logsumexp(logits_BCV, axis=-1)


class Top(NamedTuple):
    """The K likeliest tokens and their log-probabilities, likeliest first: `ids` int32, `logprobs` float; both [..., K]."""

    ids: Array
    logprobs: Array


def top(logits_BCV: jax.Array, k: int) -> Top:
    """[B, C, K] of all tokens; log-probabilities in float16, which is off by less than 1 / 1,024 of a log-probability."""
    logprobs_BCK, ids_BCK = lax.top_k(jax.nn.log_softmax(logits_BCV, axis=-1), k)
    return Top(ids_BCK, logprobs_BCK.astype(jnp.float16))


def apart(logits_BCV: jax.Array, ids_BCK: Array) -> tuple[jax.Array, jax.Array]:
    """[B, C, K] log-probabilities of some tokens, and [B, C] that of all others together."""
    whole_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    row_B11, place_1C1 = (jnp.arange(n).reshape(shape) for n, shape in zip(logits_BCV.shape[:2], ((-1, 1, 1), (1, -1, 1)), strict=True))
    others_BCV = logits_BCV.at[row_B11, place_1C1, ids_BCK].set(-jnp.inf)
    chosen_BCK = jnp.take_along_axis(logits_BCV, ids_BCK, axis=-1)
    return chosen_BCK - whole_BC[..., None], jax.nn.logsumexp(others_BCV, axis=-1) - whole_BC
