"""What becomes of each weight: copied, cast, quantized, or multiplied out of its quantized form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np

from maverick_jax.config import Config
from maverick_jax.convert.names import Weight, find_places, weights
from maverick_jax.convert.places import Index, Place, Shape, chunk_indices
from maverick_jax.convert.writer import Leaf
from maverick_jax.errors import UserError
from maverick_jax.model.parameter import Sides
from maverick_jax.model.quantized import COMPONENTS
from maverick_jax.ops.quantize import FORMATS, Format, quantize, quantized_shapes, unpack

PLAIN = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
TARGETS = (*PLAIN, *FORMATS)
Stored = Mapping[str, tuple[Shape, np.dtype]]


@dataclasses.dataclass(frozen=True)
class Step:
    """One weight on its way.

    Attributes:
      weight: our name.
      shape: of the weight.
      inputs: its leaves in the source: itself, or `.values` and `.scales`.
      outputs: its leaves in the result.
      chunk: shape of the slices of the weight that are read, changed and written at once.
      sides: which axes are its inputs; None where it cannot be quantized.
      target: what it becomes; None to leave it as it is.
    """

    weight: str
    shape: Shape
    inputs: Stored
    outputs: Mapping[str, Leaf]
    chunk: Shape
    sides: Sides | None
    target: np.dtype | Format | None

    @property
    def transform(self) -> str:
        """In a word, for people and for the manifest."""
        if self.target is None:
            return "copy"
        if isinstance(self.target, Format):
            return "quantize" if len(self.inputs) == 1 else "requantize"
        return "cast" if len(self.inputs) == 1 else "dequantize"

    @property
    def indices(self) -> list[Index]:
        """The index of every slice of the weight."""
        return chunk_indices(self.shape, self.chunk)

    def leaf_index(self, leaf: str, shape: Shape, index: Index) -> Index:
        """The slice of a leaf that belongs to a slice of the weight: all of its inputs or groups, the same outputs."""
        if leaf == self.weight or self.sides is None:
            return index
        stack, outputs = self.sides.stack, index[self.sides.stack + self.sides.inputs :]
        whole = tuple(slice(0, size) for size in shape[stack : len(shape) - len(outputs)])
        return (*index[:stack], *whole, *outputs)

    def run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """From slices of the inputs to slices of the outputs."""
        if self.target is None:
            return arrays
        if self.sides is None:
            return [arrays[0].astype(self.target)]
        weight = arrays[0] if len(arrays) == 1 else multiply_out(*arrays, self.sides)
        if isinstance(self.target, Format):
            return quantize_slice(weight, self.target, self.sides)
        return [weight.astype(self.target, copy=False)]


def multiply_out(values: np.ndarray, scales: np.ndarray, sides: Sides) -> np.ndarray:
    """What a quantized weight stands for: in float32 the products are exact, and are rounded once to the dtype of the scales."""
    stack = sides.stack
    if values.dtype == np.uint8:
        values = np.asarray(unpack(values, stack + sides.inputs - 1))
    groups = values.astype(np.float32).reshape(*values.shape[:stack], scales.shape[stack], -1, *scales.shape[stack + 1 :])
    groups *= np.expand_dims(scales.astype(np.float32), stack + 1)
    return groups.astype(scales.dtype).reshape(values.shape)


def quantize_slice(weight: np.ndarray, form: Format, sides: Sides) -> list[np.ndarray]:
    """Values and scales of a slice that has all inputs."""
    stack, outputs = sides.stack, weight.shape[sides.stack + sides.inputs :]
    shapes = quantized_shapes(weight.shape, form, outputs=len(outputs), experts=bool(stack))
    matrices = weight.reshape(math.prod(weight.shape[:stack]), -1, math.prod(outputs))
    with np.errstate(invalid="ignore"):  # values that are not finite: whoever converts names the weight
        pairs = [quantize(matrix, form) for matrix in matrices]
    return [np.stack(arrays).reshape(shape) for arrays, shape in zip(zip(*pairs, strict=True), shapes, strict=True)]


def plan_steps(config: Config, parameters: Stored, target: str | None, components: Collection[str] = ()) -> list[Step]:
    """What becomes of every weight of a model, in its order.

    Args:
      parameters: as they are stored.
      target: one of `TARGETS`; None leaves every weight as it is stored.
      components: which weights a quantized target quantizes; the others stay as they are.

    Raises:
      UserError: a target or a component that is not known.
    """
    if target is not None and target not in TARGETS:
        raise UserError(f"format {target!r} is unknown: choose one of {', '.join(TARGETS)}.")
    if unknown := [name for name in components if name not in COMPONENTS]:
        raise UserError(f"{unknown[0]!r} cannot be quantized: choose among {', '.join(COMPONENTS)}.")
    steps, places = [], find_places(config)
    for name, weight in weights(config).items():
        inputs = {leaf: parameters[leaf] for leaf in (name, f"{name}.values", f"{name}.scales") if leaf in parameters}
        steps.append(_plan(name, weight, places[name][1], inputs, target, components))
    return steps


def _plan(name: str, weight: Weight, place: Place, inputs: Stored, target: str | None, components: Collection[str]) -> Step:
    become = _target(name, weight, inputs, target, components)
    if become is None:
        stored = inputs
    elif isinstance(become, Format):
        assert weight.sides is not None
        outputs = len(weight.shape) - sum(weight.sides)
        values, scales = quantized_shapes(weight.shape, become, outputs=outputs, experts=bool(weight.sides.stack))
        stored = {f"{name}.values": (values, become.values), f"{name}.scales": (scales, become.scales)}
    else:
        stored = {name: (weight.shape, become)}
    chunk = place.chunk_shape(max(dtype.itemsize for _, dtype in stored.values()))
    step = Step(name, weight.shape, inputs, {}, chunk, weight.sides, become)
    first = step.indices[0]
    leaves = {
        leaf: Leaf(shape, dtype, tuple(part.stop for part in step.leaf_index(leaf, shape, first)))
        for leaf, (shape, dtype) in stored.items()
    }
    return dataclasses.replace(step, outputs=leaves)


def _target(name: str, weight: Weight, inputs: Stored, target: str | None, components: Collection[str]) -> np.dtype | Format | None:
    """What the weight becomes; None where it is that already or is not asked for."""
    if target is None:
        return None
    if target in PLAIN:
        return None if [dtype for _, dtype in inputs.values()] == [PLAIN[target]] else PLAIN[target]
    if weight.component not in components:
        return None
    form = FORMATS[target]
    assert weight.sides is not None
    if form.packed and weight.shape[sum(weight.sides) - 1] % 2:
        raise UserError(f"{name} has {weight.shape[sum(weight.sides) - 1]} inputs; {target} packs two in a byte: choose int8 or fp8.")
    return None if f"{name}.values" in inputs and inputs[f"{name}.values"][1] == form.values else form
