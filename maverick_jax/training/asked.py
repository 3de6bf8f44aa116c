"""What a model that does not learn says of batches: reference scores of preferences, a teacher's logits."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import trange

from maverick_jax.model import Llama4
from maverick_jax.sharding.layout import Constrain
from maverick_jax.training.batch import laid_out
from maverick_jax.training.data.pipeline import Rows


def asked(model: Llama4, of_batch: Callable[[Llama4, Any], Any]) -> Callable[[Any], Any]:
    """`of_batch(model, batch)` of every one of [A, B, ...] batches, compiled, its results on the host."""
    graphdef, state = nnx.split(model)
    everywhere = NamedSharding(model.constrain.mesh, PartitionSpec()) if isinstance(model.constrain, Constrain) else None

    def of_batches(state: Any, batches: Any) -> Any:
        return lax.map(lambda batch: of_batch(nnx.merge(graphdef, state), batch), batches)

    compiled = jax.jit(of_batches, out_shardings=everywhere)
    return lambda batches: jax.tree.map(np.asarray, compiled(state, laid_out(model, batches)))


def over_rows(
    model: Llama4, rows: Rows, of_batch: Callable[[Llama4, Any], Any], *, batch: int, what: str, first: int = 0, progress: bool = False
) -> Iterator[Any]:
    """`of_batch(model, rows)` of `batch` rows at a time, from the row `first` on; the last ones perhaps fewer.

    Args:
      of_batch: what `rows` makes of [batch] rows -> a tree of [batch, ...].
      what: is being done, for the bar.
    """
    ask = asked(model, of_batch)
    for start in trange(first, len(rows), batch, desc=what, unit="batch", disable=None if progress else True):
        chosen = np.minimum(np.arange(start, start + batch), len(rows) - 1)
        yield jax.tree.map(operator.itemgetter((0, slice(len(rows) - start))), ask(rows(chosen[None])))
