"""How a model shows itself: `repr` in one line, and the arguments that `help` names."""

from __future__ import annotations

import inspect
import math
from typing import Any

import jax
from jax.core import Tracer


class SignatureOfInit:
    """`inspect.signature` and `help` of a class read its `__signature__`; flax's metaclass would tell them `(*args, **kwargs)`."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:  # what an instance takes, its `__call__` says
            raise AttributeError("__signature__")
        _, *arguments = inspect.signature(owner.__init__).parameters.values()
        return inspect.Signature(arguments)


def describe(model: Any) -> str:
    """`Llama4(48 layers, 24 with 128 experts, vision, 401,583,781,376 parameters, bfloat16, on data=1, expert=8, tensor=1)`."""
    text, embedding = model.config.text, jax.tree.leaves(model.text.embedding)[0]
    parts = [f"{text.num_hidden_layers} layers"]
    if text.moe_layers:
        parts.append(f"{len(text.moe_layers)} with {text.num_local_experts} experts")
    if model.config.vision is not None:
        parts.append("vision")
    # Quantized and adapted weights have the shapes that they stand for.
    weights = jax.tree.leaves(model, is_leaf=lambda part: hasattr(part, "scales") or hasattr(part, "base"))
    parts += [f"{sum(math.prod(weight.shape) for weight in weights):,} parameters", embedding.dtype.name]
    adapted = [weight for weight in weights if hasattr(weight, "base")]
    if any(hasattr(getattr(weight, "base", weight), "scales") for weight in weights):
        parts.append("quantized")
    if adapted:
        parts.append(f"adapters of {sum(weight.a.size + weight.b.size for weight in adapted):,} parameters")
    if isinstance(embedding, jax.ShapeDtypeStruct):
        parts.append("no weights")
    elif not isinstance(embedding, Tracer):
        mesh = getattr(embedding.sharding, "mesh", None)
        parts.append("on one device" if mesh is None else "on " + ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()))
    return f"Llama4({', '.join(parts)})"
