"""What becomes of each weight: copied, cast, quantized, or multiplied out of its quantized form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Protocol

import ml_dtypes
import numpy as np

from maverick_jax.config import Config
from maverick_jax.convert.build.writer import Leaf
from maverick_jax.convert.formats.agreement import compare_names
from maverick_jax.convert.formats.names import Weight, find_places, weights
from maverick_jax.convert.formats.places import Index, Place, Shape, chunk_indices
from maverick_jax.errors import UserError
from maverick_jax.model.parameter import Sides
from maverick_jax.model.quantized import COMPONENTS
from maverick_jax.ops.quantize import COLUMNS, FORMATS, Format, quantize, quantized_shapes, unpack

PLAIN = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
TARGETS = (*PLAIN, *FORMATS)
RECIPE = 1  # rises when the same weights become other values: an unfinished conversion of an older recipe is not continued
Stored = Mapping[str, tuple[Shape, np.dtype]]
NOTHING = Weight((), None, None)


class Readable(Protocol):
    """Parameters that can be read by slices: a `Source` or a `ModelDirectory`."""

    def read(self, name: str, index: Index) -> np.ndarray: ...


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

    @property
    def rounds(self) -> bool:
        """Whether the result may not stand for exactly the weight of the source."""
        if self.target is None or isinstance(self.target, Format):
            return self.target is not None
        return self.target.itemsize < max(dtype.itemsize for _, dtype in self.inputs.values()) or self._is_half_to_half

    @property
    def _is_half_to_half(self) -> bool:
        """float16 and bfloat16 are of one size, and neither holds the other."""
        return {dtype.name for _, dtype in self.inputs.values()} == {"float16"} and self.target == PLAIN["bfloat16"]

    @property
    def held_between(self) -> int:
        """Bytes of a whole slice that are held between its inputs and its outputs."""
        if self.target is None:
            return 0
        multiplied_out = self.inputs[f"{self.weight}.scales"][1].itemsize if len(self.inputs) == 2 else 0
        quantized = self.target.values.itemsize if isinstance(self.target, Format) else 0
        return math.prod(self.chunk) * (multiplied_out + quantized)

    def input_slices(self, index: Index) -> list[tuple[str, Index]]:
        """The slices of the inputs that belong to a slice of the weight."""
        return [(leaf, self.leaf_index(leaf, shape, index)) for leaf, (shape, _) in self.inputs.items()]

    def output_slices(self, index: Index) -> list[tuple[str, Index]]:
        """The slices of the outputs that belong to a slice of the weight."""
        return [(name, self.leaf_index(name, leaf.shape, index)) for name, leaf in self.outputs.items()]

    def read(self, source: Readable, index: Index) -> list[np.ndarray]:
        """The inputs' values in a slice of the weight."""
        return [source.read(leaf, part) for leaf, part in self.input_slices(index)]

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
    out = np.empty(values.shape, scales.dtype)
    for at in range(0, values.shape[-1], COLUMNS):  # float32 copies stay small
        columns = (..., slice(at, at + COLUMNS))
        part, factor = values[columns], np.expand_dims(scales[columns].astype(np.float32), stack + 1)
        groups = part.astype(np.float32).reshape(*part.shape[:stack], scales.shape[stack], -1, *factor.shape[stack + 2 :])
        groups *= factor
        out[columns] = groups.reshape(part.shape)
    return out


def quantize_slice(weight: np.ndarray, form: Format, sides: Sides) -> list[np.ndarray]:
    """Values and scales of a slice that has all inputs."""
    stack, outputs = sides.stack, weight.shape[sides.stack + sides.inputs :]
    shapes = quantized_shapes(weight.shape, form, outputs=len(outputs), experts=bool(stack))
    values, scales = np.empty(shapes[0], form.values), np.empty(shapes[1], form.scales)
    matrices = [array.reshape(math.prod(weight.shape[:stack]), -1, math.prod(outputs)) for array in (weight, values, scales)]
    with np.errstate(invalid="ignore", over="ignore"):  # values that are not finite: whoever converts names the weight
        for matrix, values_KN, scales_GN in zip(*matrices, strict=True):
            values_KN[...], scales_GN[...] = quantize(matrix, form)
    return [values, scales]


def check_target(target: str | None, quantize: str | Collection[str] | None) -> tuple[str, ...]:
    """Which components are quantized: those that are named, as a list or a text with commas; with None, the routed experts.

    Raises:
      UserError: a target or a component that is not known, components for a target that quantizes none, or none for one that does.
    """
    _check_names(target, ())
    if quantize is None:
        return ("experts",)
    names = quantize.split(",") if isinstance(quantize, str) else quantize
    if not isinstance(names, Collection) or isinstance(names, bytes):
        raise UserError(f"quantize is {quantize!r:.100}: name some of {', '.join(COMPONENTS)}.")
    named = [name.strip() if isinstance(name, str) else name for name in names if name != ""]
    _check_names(target, named)
    if target not in FORMATS or not named:
        raise UserError(f"quantize {quantize!r} takes a format that quantizes ({', '.join(FORMATS)}), and some of {', '.join(COMPONENTS)}.")
    return tuple(component for component in COMPONENTS if component in named)


def _check_names(target: str | None, components: Collection[str]) -> None:
    if target is not None and target not in TARGETS:
        raise UserError(f"format {target!r:.100} is unknown: choose one of {', '.join(TARGETS)}.")
    if unknown := [name for name in components if name not in COMPONENTS]:
        raise UserError(f"{unknown[0]!r:.100} cannot be quantized: choose among {', '.join(COMPONENTS)}.")


def plan_steps(config: Config, parameters: Stored, target: str | None, components: Collection[str] = ()) -> list[Step]:
    """What becomes of every weight of a model, in its order.

    Args:
      parameters: as they are stored.
      target: one of `TARGETS`; None leaves every weight as it is stored.
      components: which weights a quantized target quantizes; the others stay as they are.

    Raises:
      UserError: a target or a component that is not known, or parameters that are not this model's.
    """
    _check_names(target, components)
    steps, places = [], find_places(config)
    check_parameters(config, parameters)
    for name, weight in weights(config).items():
        inputs = {leaf: parameters[leaf] for leaf in (name, f"{name}.values", f"{name}.scales") if leaf in parameters}
        steps.append(_plan(name, weight, places[name][1], inputs, target, components))
    return steps


def note_requantized(steps: Collection[Step]) -> list[str]:
    """That weights are rounded for a second time, if they are."""
    again = [step.weight for step in steps if step.transform == "requantize"]
    if not again:
        return []
    return [f"{len(again):,} weights were quantized before: both errors add up; one made from the unquantized checkpoint is closer to it."]


def check_parameters(config: Config, parameters: Stored) -> None:
    """Refuse parameters that are not those of the model, each plain or quantized."""
    expected = weights(config)
    found: dict[str, Shape] = {}
    for name, (shape, dtype) in parameters.items():
        weight, _, leaf = name.rpartition(".")
        if leaf == "values" and f"{weight}.scales" in parameters and (sides := expected.get(weight, NOTHING).sides) is not None:
            last = sum(sides) - 1
            found[weight] = (*shape[:last], shape[last] * (1 + (dtype == np.uint8)), *shape[last + 1 :])
        elif not (leaf == "scales" and f"{weight}.values" in parameters):
            found[name] = shape
    compare_names("the checkpoint", found, expected)
    for name, weight in expected.items():
        if found[name] != weight.shape:
            raise UserError(f"{name} has shape {list(found[name])}, the model's config asks for {list(weight.shape)}.")


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
    chunk = place.chunk_shape(next(iter(stored.values()))[1].itemsize)
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
