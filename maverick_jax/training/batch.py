"""What a training step learns from, and a model's way through it.

Shape suffixes: A micro-batches, B rows, T tokens, N tiles, S pixels, M layers with experts, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maverick_jax.model import Llama4
from maverick_jax.sharding.dispatch import Stats
from maverick_jax.sharding.layout import Constrain

Array = jax.Array | np.ndarray


class Batch(NamedTuple):
    """Rows of tokens, the token that follows each of them, and how much its prediction counts.

    Attributes:
      ids_BT: int32, padded on the right.
      lengths_B: int32, real tokens of every row.
      target_BT: int32, where `weight_BT` is not 0 the token that comes next.
      weight_BT: float32.
      document_BT: int32, which of its row's documents a token belongs to (-1: padding); None: every row is one.
      tiles_N3SS: float32, all pictures' tiles in the order of their patches; further ones may follow. None: there are no pictures.
      expert_BTM: unsigned, the experts that tokens go to; None: those that the routers choose.
    """

    ids_BT: Array
    lengths_B: Array
    target_BT: Array
    weight_BT: Array
    document_BT: Array | None = None
    tiles_N3SS: Array | None = None
    expert_BTM: Array | None = None


def read(model: Llama4, batch: Batch) -> tuple[jax.Array, tuple[Stats, ...]]:
    """[B, T, D] normed hidden states, and the stats of the mixtures."""
    real_BT = jnp.arange(batch.ids_BT.shape[1])[None, :] < batch.lengths_B[:, None]
    features, index_BT = None, None
    if batch.tiles_N3SS is not None:
        features = model.encode_tiles(batch.tiles_N3SS)
        is_patch_BT = (batch.ids_BT == model.config.image_token_index) & real_BT
        index_BT = jnp.cumsum(is_patch_BT.reshape(-1)).reshape(is_patch_BT.shape) - 1
    x_BTD = model.embed(batch.ids_BT, features, index_BT)
    x_BTD, _, stats = model.hidden(x_BTD, batch.lengths_B, document_BT=batch.document_BT, expert_BTM=batch.expert_BTM)
    return x_BTD, stats


def laid_out(model: Llama4, batch: Any) -> Any:
    """A batch of [A, B, ...] on the model's devices: rows divided as the layout divides batches."""
    if not isinstance(model.constrain, Constrain):
        return batch
    constrain = model.constrain

    def place(array: np.ndarray) -> jax.Array:
        rows = constrain.layout.spec(("batch",), array.shape[1:2], constrain.mesh)
        sharding = NamedSharding(constrain.mesh, PartitionSpec(None, *rows))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, batch)
