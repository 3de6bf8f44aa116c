"""What a load must cost at least on the machine it runs on: bytes that are read, and products that are made, at full rate."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maverick_jax.bench.machine import Machine
from maverick_jax.inference.sizes import PIECE
from maverick_jax.model import Llama4
from maverick_jax.ops.quantize import FORMATS
from maverick_jax.plan import roofline
from maverick_jax.plan.case import Case
from maverick_jax.sharding.layout import get_layout
from maverick_jax.sharding.mesh import AXES


class Floor(NamedTuple):
    """Seconds that a device needs to read its bytes, and to make its products; each alone."""

    memory: float
    compute: float

    def __add__(self, other: Floor) -> Floor:  # type: ignore[override]  # of two tuples: one behind the other
        return Floor(self.memory + other.memory, self.compute + other.compute)


def case_of(model: Llama4, machine: Machine, batch: int, context: int) -> Case:
    """The question that `maverick plan` would be asked: this model where it lies."""
    mesh = getattr(model.constrain, "mesh", None)
    shape = tuple(mesh.shape[axis] if mesh is not None else 1 for axis in AXES)
    layout = get_layout(getattr(model.constrain, "layout", None))
    return Case(model.config, machine.topology, shape, layout, stored_dtype(model), batch, context)


def stored_dtype(model: Llama4) -> str:
    """As a plan calls it: the form of quantized experts, else the width of an element."""
    dtypes = {jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(model)}
    form = next((name for name, form in FORMATS.items() if jnp.dtype(form.values) in dtypes), None)
    return form or ("float32" if jnp.dtype(model.text.embedding.dtype).itemsize == 4 else "bfloat16")


def decode_floor(case: Case, prompt: int, new: int) -> Floor:
    """Of a step in the middle of answers of `new` tokens: one token of every row."""
    return _floor(roofline.step(case, case.batch, 1, prompt + new // 2))


def prefill_floor(case: Case, prompt: int) -> Floor:
    """Of all prompts, in calls as large as the engine makes them: each reads the experts again."""
    text = case.config.text
    piece = min([prompt, PIECE, *filter(None, map(text.chunk_of_layer, range(text.num_hidden_layers)))])
    most, total = max(1, PIECE // piece), Floor(0.0, 0.0)
    for rows, times in ((most, case.batch // most), (case.batch % most, 1)):
        for start in range(0, prompt, piece) if rows and times else ():
            once = _floor(roofline.step(case, rows, min(piece, prompt - start), start))
            total += Floor(times * once.memory, times * once.compute)
    return total


def _floor(cost: roofline.Cost) -> Floor:
    return Floor(cost.seconds["memory"], cost.seconds["compute"])
