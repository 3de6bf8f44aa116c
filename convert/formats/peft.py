"""Adapters as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`, read into thin matrices of ours and spelled back.

A module `X` has `X.lora_A.weight` [r, inputs] and `X.lora_B.weight` [outputs, r]. Routed experts are one parameter of a module, and the
module is wrapped once for each of its parameters, gate|up first, so that of both the inner one (`experts.base_layer`) is gate|up. Their
matrices are stacked, of A by expert, of B by rank. Which is which depends on the reader:

    PEFT, of transformers' Llama 4   A [E r, outputs]   B [inputs, r E]   it takes a parameter [E, x, y] for [outputs, inputs]
    vLLM                             A [E r, inputs]    B [outputs, r E]

gate|up have one pair of matrices together: two of ours become one of the rank of both, unless they share `a`, as those do that were read.

Shape suffixes: E experts, K inputs, N outputs, r rank.
Sources: PEFT 0.21's `tuners/lora/layer.py` (ParamWrapper); vLLM's `lora/layers/fused_moe.py` and `lora/model_manager.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maverick_jax.config import Config
from maverick_jax.convert.formats import names
from maverick_jax.convert.formats.foreign import read_optional
from maverick_jax.convert.formats.places import Shape
from maverick_jax.convert.formats.safetensors import read_header
from maverick_jax.convert.formats.tensor_file import Tensor, read_bytes
from maverick_jax.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BEGIN = "base_model.model."
LAYOUTS = ("peft", "vllm")
HALF = re.compile(r"base_model\.model\.(?P<module>.+?)\.lora_(?P<half>[AB])(\.\w+)?\.weight")
EXPERTS = re.compile(r".+\.feed_forward\.experts(\.base_layer)?")
UNCHANGED = re.compile(r".+\.base_layer\.(weight|bias)")  # of an unembedding that has an adapter
REFUSED = {  # what changes the sum -> how it is called
    "use_dora": "DoRA",
    "lora_bias": "biases",
    "fan_in_fan_out": "transposed weights",
    "use_qalora": "QALoRA",
    "modules_to_save": "whole weights beside the adapter",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "repeated layers",
}


class Matrices(NamedTuple):
    """An adapter of one weight: it stands for `base + scale * a b`.

    Attributes:
      a: [*E, *K, r].
      b: [*E, r, *N].
    """

    a: np.ndarray
    b: np.ndarray
    scale: float


Adapter = dict[str, Matrices]


def read_peft(directory: Path, config: Config) -> Adapter:
    """An adapter for a model of this config, by the names of our weights.

    Raises:
      UserError: there is none, it is damaged, of another kind than a plain LoRA, or for another model.
    """
    file, settings = directory / WEIGHTS, read_optional(directory / CONFIG)
    if not settings or not file.is_file():
        missing = CONFIG if not settings else WEIGHTS
        raise UserError(f"{directory} is no adapter of PEFT: it has no {missing}.")
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{directory} is a {settings.get('peft_type')} adapter of PEFT: only LORA is read.")
    if wrong := [words for field, words in REFUSED.items() if settings.get(field)]:
        raise UserError(f"{directory} is a LoRA with {' and '.join(wrong)}, which is not read: merge it into its base in PEFT.")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{directory} is a LoRA that learned biases, which Llama 4's text does not have: train it with bias='none'.")
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_header(file).items():
        if found := HALF.fullmatch(name):
            modules.setdefault(found["module"], {})[found["half"]] = tensor
        elif not UNCHANGED.fullmatch(name):
            raise UserError(f"{file} has {name}, which is no part of a LoRA of Llama 4.")
    for module, halves in modules.items():
        if len(halves) < 2:
            raise UserError(f"{file} has lora_{next(iter(halves))} of {module} alone: fetch it again.")
    reader = _Reader(file, settings, config)
    adapter = dict(pair for module, halves in modules.items() for pair in reader.read(module, halves))
    if not adapter:
        raise UserError(f"{file} has no adapters in it.")
    return {name: adapter[name] for name in names.weights(config) if name in adapter}


class _Reader:
    def __init__(self, file: Path, settings: Mapping[str, Any], config: Config):
        self.file, self.settings, self.config = file, settings, config
        self.ours = {module: name for name, module in modules_of(config).items()}
        self.weights = names.weights(config)

    def read(self, module: str, halves: Mapping[str, Tensor]) -> Iterable[tuple[str, Matrices]]:
        """Our weights that a module is, and their matrices."""
        if EXPERTS.fullmatch(module):
            return self._experts(module, halves)
        name = next((self.ours[spelled] for spelled in _spellings(module) if spelled in self.ours), None)
        if name is None:
            raise UserError(f"{self.file} adapts {module}, which this model does not have: it is for another base, {self._base()}.")
        (stack, inputs), shape = self.weights[name].sides or (0, 1), self.weights[name].shape
        K, N = shape[stack : stack + inputs], shape[stack + inputs :]
        rank = halves["A"].shape[0]
        self._check(module, halves, (rank, math.prod(K)), (math.prod(N), rank))
        a, b = _values(halves["A"]).T.reshape(*K, rank), _values(halves["B"]).T.reshape(rank, *N)
        return [(name, Matrices(a, b, self._scale(module, rank)))]

    def _experts(self, module: str, halves: Mapping[str, Tensor]) -> Iterable[tuple[str, Matrices]]:
        text, begin = self.config.text, module.removesuffix(".base_layer")
        layer = names.layer_of(f".{begin}.")
        ours = f"text.layers.{layer}.feed_forward.experts"
        if f"{ours}.down" not in self.weights:
            raise UserError(f"{self.file} adapts routed experts of layer {layer}, which has none: it is for another base, {self._base()}.")
        E, D, F = text.num_local_experts, text.hidden_size, text.intermediate_size
        rank = halves["A"].shape[0] // E
        sides = {("gate_up_proj", D, 2 * F), ("down_proj", F, D)}
        fitting = [
            (part, swapped)
            for swapped in (True, False)
            for part, K, N in sorted(sides)
            if [halves[half].shape for half in "AB"] == ([(E * rank, N), (K, rank * E)] if swapped else [(E * rank, K), (N, rank * E)])
        ]
        if not fitting or not rank:
            found = " and ".join(str(list(halves[half].shape)) for half in "AB")
            raise UserError(
                f"{self.file}: lora_A and lora_B of {module} are {found}, which fits no stack of {E} experts of {D} x {2 * F} or "
                f"{F} x {D}: it is for another base, {self._base()}."
            )
        part, swapped = fitting[0]
        first, second = _values(halves["A"]), _values(halves["B"])
        stacked, interleaved = first.reshape(E, rank, -1), np.moveaxis(second.reshape(-1, rank, E), 2, 0)
        a, b = (interleaved, stacked) if swapped else (stacked.swapaxes(1, 2), interleaved.swapaxes(1, 2))
        scale = self._scale(f"{begin}.{part}", rank)
        if part == "down_proj":
            return [(f"{ours}.down", Matrices(a, b, scale))]
        return [(f"{ours}.gate", Matrices(a, b[..., :F], scale)), (f"{ours}.up", Matrices(a, b[..., F:], scale))]

    def _scale(self, module: str, rank: int) -> float:
        patterns, alpha = self.settings.get("alpha_pattern") or {}, self.settings.get("lora_alpha")
        alpha = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), alpha)
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise UserError(f"{self.file.parent / CONFIG}: lora_alpha is {alpha!r:.40}, and not a number.")
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _check(self, module: str, halves: Mapping[str, Tensor], *expected: Shape) -> None:
        for half, shape in zip("AB", expected, strict=True):
            if halves[half].shape != shape or 0 in shape:
                raise UserError(
                    f"{self.file}: lora_{half} of {module} has shape {list(halves[half].shape)}, this model asks for {list(shape)}: "
                    f"it is for another base, {self._base()}."
                )

    def _base(self) -> str:
        return f"perhaps {self.settings.get('base_model_name_or_path') or 'one that it does not name'}"


def modules_of(config: Config) -> dict[str, str]:
    """Our name -> transformers' module, of every matrix of a product but those of routed experts."""
    return {
        name: stored.removesuffix(".weight")
        for name, (stored, _) in names.find_places(config).items()
        if names.weights(config)[name].sides is not None and stored.endswith(".weight")
    }


def _spellings(module: str) -> list[str]:
    """What our table may call it: with or without a model around the language model, or as transformers' other families have it."""
    inner = module.removeprefix("model.")
    return [
        module,
        f"language_model.{module}",
        module.removeprefix("language_model."),
        re.sub(r"^language_model\.", "language_model.model.", inner),
        inner,
    ]


def _values(tensor: Tensor) -> np.ndarray:
    array = np.empty(tensor.shape, tensor.dtype)
    read_bytes(tensor.file, tensor.offset, array.reshape(-1).view(np.uint8).data)
    return array


def spell(adapter: Mapping[str, Matrices], config: Config, layout: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """PEFT's tensors by name, and the fields of its config that say which weights are adapted and how.

    Args:
      layout: of routed experts, one of `LAYOUTS`.
    """
    modules, tensors = modules_of(config), {}
    scales: dict[str, tuple[int, float]] = {}  # module or parameter -> rank and scale
    wrapped: list[str] = []
    for name, matrices in adapter.items():
        if name not in modules:
            continue
        a, b, scale = matrices
        rank = a.shape[-1]
        tensors |= _halves(modules[name], a.reshape(-1, rank).T, b.reshape(rank, -1).T)
        scales[modules[name]] = rank, scale
    begin = "" if config.vision is None else "language_model."
    for layer in sorted({int(names.layer_of(name)) for name in adapter if name not in modules}):
        ours, theirs = f"text.layers.{layer}.feed_forward.experts", f"{begin}model.layers.{layer}.feed_forward.experts"
        parts = {"gate_up_proj": _fuse(adapter.get(f"{ours}.gate"), adapter.get(f"{ours}.up")), "down_proj": adapter.get(f"{ours}.down")}
        there = {part: matrices for part, matrices in parts.items() if matrices is not None}
        for part, (a, b, scale) in there.items():
            inner = ".base_layer" if len(there) == 2 and part == "gate_up_proj" else ""
            rank = a.shape[-1]
            stacked, interleaved = (b, a) if layout == "peft" else (a.swapaxes(1, 2), b.swapaxes(1, 2))
            second = np.moveaxis(interleaved, 0, 2).reshape(interleaved.shape[1], -1)
            tensors |= _halves(f"{theirs}{inner}", stacked.reshape(-1, stacked.shape[2]), second)
            scales[f"{theirs}.{part}"] = rank, scale
            wrapped.append(f"{theirs}.{part}")
    return tensors, _settings(scales, wrapped)


def _halves(module: str, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{BEGIN}{module}.lora_{half}.weight": np.ascontiguousarray(array) for half, array in (("A", a), ("B", b))}


def _fuse(gate: Matrices | None, up: Matrices | None) -> Matrices | None:
    """One pair of matrices for gate|up."""
    if gate is None and up is None:
        return None
    if gate is None or up is None:
        raise UserError("an adapter of the routed experts' gate alone, or of up alone, has no PEFT layout: adapt both.")
    if gate.scale == up.scale and gate.a.shape == up.a.shape and np.array_equal(gate.a, up.a):
        return Matrices(gate.a, np.concatenate([gate.b, up.b], axis=2), gate.scale)
    b_up = up.b * np.asarray(up.scale / gate.scale, up.b.dtype)
    b = np.concatenate(
        [
            np.concatenate([gate.b, np.zeros_like(gate.b, shape=(*gate.b.shape[:2], up.b.shape[2]))], axis=2),
            np.concatenate([np.zeros_like(up.b, shape=(*up.b.shape[:2], gate.b.shape[2])), b_up], axis=2),
        ],
        axis=1,
    )
    return Matrices(np.concatenate([gate.a, up.a], axis=2), b, gate.scale)


def _settings(scales: Mapping[str, tuple[int, float]], wrapped: list[str]) -> dict[str, Any]:
    """Fields of `adapter_config.json`: the commonest rank and alpha, and by pattern what differs; a pattern names a kind in all layers."""
    kinds: dict[str, set[tuple[int, float]]] = {}
    for module, value in scales.items():
        kinds.setdefault(_kind(module), set()).add(value)
    every = list(scales.values())
    rank, scale = max(set(every), key=every.count)
    patterns: dict[str, tuple[int, float]] = {}
    for module, value in scales.items():
        kind = _kind(module)
        if value != (rank, scale):
            patterns[kind if len(kinds[kind]) == 1 else re.escape(module)] = value
    modules = sorted(module for module in scales if module not in wrapped)
    return {
        "r": rank,
        "lora_alpha": _number(rank * scale),
        "target_modules": modules,
        "target_parameters": sorted(wrapped) or None,
        "rank_pattern": {key: value for key, (value, _) in patterns.items()},
        "alpha_pattern": {key: _number(value * scale) for key, (value, scale) in patterns.items()},
    }


def _kind(module: str) -> str:
    return re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(module))


def _number(value: float) -> float:
    return int(value) if value == int(value) else value
