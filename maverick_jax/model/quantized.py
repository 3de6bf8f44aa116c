"""Quantized weights in a model: which weights can be, the leaves they then have, and the module that takes a weight's place.

A quantized weight `X` has two leaves, `X.values` and `X.scales`; what they hold says `ops.quantize`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Format, Layout

from maverick_jax.errors import UserError
from maverick_jax.model.llama4 import Llama4
from maverick_jax.model.parameter import Axes, Sides, parameter_name, replace_weight
from maverick_jax.ops.grouped_matmul import takes_float8_rows
from maverick_jax.ops.quantize import FLOAT8, FORMATS, QuantizedArray, Shape, quantized_shapes
from maverick_jax.ops.toolkit import on_hopper

Stored = tuple[Shape, Any]  # shape and dtype
COMPONENTS = ("experts", "shared", "dense", "attention")
VALUES = {form.values: form.packed for form in FORMATS.values()}
SCALES = (jnp.dtype("bfloat16"), jnp.dtype("float16"), jnp.dtype("float32"))


class QuantizedWeight(nnx.Module):
    """In the place of an `nnx.Param`: `weight[...]` is what a product takes, `weight.shape` what it stands for; axes and sides are its."""

    def __init__(self, values: nnx.Param, scales: nnx.Param, shape: Shape, axes: Axes, sides: Sides):
        self.values = values
        self.scales = scales
        self.shape = shape
        self.axes = axes
        self.sides = sides
        self.float8_rows = False

    def __getitem__(self, _: EllipsisType) -> QuantizedArray:
        return QuantizedArray(self.values[...], self.scales[...], self.float8_rows)


def component(path: tuple) -> str | None:
    """Which of `COMPONENTS` a parameter belongs to: `("text", "layers", 1, "feed_forward", "experts", "gate")` -> "experts"."""
    match path:
        case ("text", "layers", _, "attention", *_):
            return "attention"
        case ("text", "layers", _, "feed_forward", "experts" | "shared" as part, *_):
            return part
        case ("text", "layers", _, "feed_forward", "gate" | "up" | "down", *_):
            return "dense"
    return None


def quantizable(model: Llama4, components: Collection[str] = ("experts",)) -> Iterator[tuple[str, nnx.Param]]:
    """Name and parameter of every weight of these components. `param.get_metadata()["sides"]` says which axes are its inputs."""
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if component(path) in components:
            yield parameter_name(path), leaf


def quantized_leaves(model: Llama4, form: str, components: Collection[str] = ("experts",)) -> dict[str, Stored]:
    """Shape and dtype of every leaf that the model has once these components are quantized, by dotted name.

    Args:
      model: unquantized; abstract will do.
      form: one of `FORMATS`.
    """
    chosen, found = dict(quantizable(model, components)), {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = parameter_name(path)
        if name in chosen:
            values, scales = _shapes(leaf, form)
            found[f"{name}.values"], found[f"{name}.scales"] = (values, FORMATS[form].values), (scales, FORMATS[form].scales)
        else:
            found[name] = (leaf.shape, np.dtype(leaf.dtype))
    return found


def _shapes(leaf: nnx.Param, form: str) -> tuple[Shape, Shape]:
    stack, inputs = leaf.get_metadata()["sides"]
    return quantized_shapes(leaf.shape, FORMATS[form], outputs=len(leaf.shape) - stack - inputs, experts=bool(stack))


def set_quantized(model: Llama4, stored: Mapping[str, Stored]) -> None:
    """Put a `QuantizedWeight` with abstract leaves in the place of every weight `X` of which `X.values` is stored.

    Args:
      model: unquantized, abstract.
      stored: shape and dtype of every parameter of a checkpoint, by dotted name.

    Raises:
      UserError: names a parameter whose scales are missing, or whose shape or dtype does not fit.
    """
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = parameter_name(path)
        if f"{name}.values" in stored and "sides" in leaf.get_metadata():
            replace_weight(model, path, _quantized(name, leaf, stored))


def use_float8_rows(model: Llama4) -> None:
    """Let the products of the routed experts take their rows in float8 too.

    Args:
      model: abstract will do.

    Raises:
      UserError: these experts are not in float8.
    """
    weights = [module for path, module in nnx.iter_modules(model) if component(path) == "experts"]
    stacks = [weight for weight in weights if isinstance(weight, QuantizedWeight) and weight.values.dtype == FLOAT8]
    for weight in stacks:
        weight.float8_rows = True
    if not stacks:
        raise UserError(
            "activations are asked for in fp8, and this model's routed experts are not: `maverick convert --format fp8` makes such a "
            "model, and the released FP8 checkpoint is one."
        )


def lay_for_float8_rows(model: Llama4) -> None:
    """On Hopper, stacks that meet rows in float8 are laid anew, one by one."""
    for _, weight in nnx.iter_modules(model):
        if not isinstance(weight, QuantizedWeight) or not weight.float8_rows:
            continue
        values, on_device = weight.values[...], jax.tree.map(_on_device, weight[...])
        if all(d.platform == "gpu" for d in values.sharding.device_set) and on_hopper() and takes_float8_rows(on_device):
            weight.values.set_value(inputs_together(values))


def _on_device(array: jax.Array) -> jax.ShapeDtypeStruct:
    """What each device has of it."""
    return jax.ShapeDtypeStruct(array.sharding.shard_shape(array.shape), array.dtype)


def inputs_together(values_EKN: jax.Array) -> jax.Array:
    """The same array, in which the bytes of one output's inputs are neighbours. The one that is given is used up."""
    there = Format(Layout(major_to_minor=(0, 2, 1)), values_EKN.sharding)
    return jax.jit(lambda values: values, out_shardings=there, donate_argnums=0)(values_EKN)


def _quantized(name: str, leaf: nnx.Param, stored: Mapping[str, Stored]) -> QuantizedWeight:
    axes: Axes = leaf.get_metadata()["axes"]
    sides: Sides = leaf.get_metadata()["sides"]
    if f"{name}.scales" not in stored:
        raise UserError(f"{name}.values is stored without {name}.scales: convert the checkpoint again.")
    (values, values_dtype), (scales, scales_dtype) = (
        (tuple(shape), np.dtype(dtype)) for shape, dtype in (stored[f"{name}.values"], stored[f"{name}.scales"])
    )
    if values_dtype not in VALUES:
        raise UserError(f"{name}.values has dtype {values_dtype}: {', '.join(map(str, VALUES))} are supported.")
    if scales_dtype not in SCALES:
        raise UserError(f"{name}.scales has dtype {scales_dtype}: {', '.join(map(str, SCALES))} are supported.")
    last = sides.stack + sides.inputs
    packed = 1 + VALUES[values_dtype]
    expected = (*leaf.shape[: last - 1], leaf.shape[last - 1] // packed, *leaf.shape[last:])
    if values != expected or leaf.shape[last - 1] % packed:
        raise UserError(f"{name}.values has shape {values}, config.json asks for {expected} in {values_dtype}.")
    groups = scales[sides.stack] if len(scales) > sides.stack else 0
    lead, outputs = slice(0, sides.stack), slice(last, None)
    stored_inputs = int(np.prod(values[sides.stack : last]))
    if scales != (*leaf.shape[lead], groups, *leaf.shape[outputs]) or not groups or stored_inputs % groups:
        wanted = ", ".join(map(str, (*leaf.shape[lead], "G", *leaf.shape[outputs])))
        raise UserError(
            f"{name}.scales has shape {scales}, expected ({wanted}) with G a divisor of the {stored_inputs} rows of the values."
        )
    # Groups follow each other along the first input axis, and are divided with it.
    group_axis = axes[sides.stack] if groups > 1 else None
    return QuantizedWeight(
        _abstract(values, values_dtype, axes),
        _abstract(scales, scales_dtype, (*axes[lead], group_axis, *axes[outputs])),
        tuple(leaf.shape),
        axes,
        sides,
    )


def _abstract(shape: Shape, dtype: np.dtype, axes: Axes) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)
