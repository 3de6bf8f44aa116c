"""What a model says of every row of a file, in order: reference scores of preferences, a teacher's logits."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import trange

from maverick_jax.model import Llama4
from maverick_jax.sharding.layout import Constrain
from maverick_jax.training.batch import laid_out
from maverick_jax.training.data.pipeline import Rows


def over_rows(
    model: Llama4, rows: Rows, of_batch: Callable[[Llama4, Any], Any], *, batch: int, what: str, progress: bool = False
) -> Iterator[Any]:
    """`of_batch(model, rows)` of `batch` rows at a time, on the host; the last ones perhaps fewer.

    Args:
      of_batch: what `rows` makes of [batch] rows -> a tree of [batch, ...].
      what: is being done, for the bar.
    """
    graphdef, state = nnx.split(model)
    everywhere = NamedSharding(model.constrain.mesh, PartitionSpec()) if isinstance(model.constrain, Constrain) else None

    def step(state: Any, stacked: Any) -> Any:
        return of_batch(nnx.merge(graphdef, state), jax.tree.map(lambda x: x[0], stacked))

    compiled = jax.jit(step, out_shardings=everywhere)
    for start in trange(0, len(rows), batch, desc=what, unit="batch", disable=None if progress else True):
        chosen = np.minimum(np.arange(start, start + batch), len(rows) - 1)
        found = jax.tree.map(np.asarray, compiled(state, laid_out(model, rows(chosen[None]))))
        yield jax.tree.map(operator.itemgetter(slice(len(rows) - start)), found)
