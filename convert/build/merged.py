"""Weights with an adapter added to them, slice by slice: what an adapted model is without its adapter.

Shape suffixes: E experts, K inputs, N outputs, r rank.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import numpy as np

from maverick_jax.config import Config
from maverick_jax.convert.formats import names
from maverick_jax.convert.formats.adapter_base import check_base, fingerprint
from maverick_jax.convert.formats.peft import read_peft
from maverick_jax.convert.formats.places import Index, Shape
from maverick_jax.errors import UserError


class Parameters(Protocol):
    """What can be exported: a `ModelSource`, or a view of one."""

    parameters: dict[str, tuple[Shape, np.dtype]]

    def read(self, name: str, index: Index) -> np.ndarray: ...


class Merged:
    """`base + scale * a b`, summed in float32 and rounded once to the dtype of the base; other weights are as they are.

    Raises:
      UserError: no adapter, one for another base, or one of weights that are quantized.
    """

    def __init__(self, source: Parameters, config: Config, adapter: Path):
        self.source, self.parameters, self.weights = source, source.parameters, names.weights(config)
        self.adapter = read_peft(adapter, config)
        if quantized := [name for name in self.adapter if f"{name}.values" in self.parameters]:
            raise UserError(f"{quantized[0]} is quantized, and nothing can be added to it: export with --format bfloat16.")
        check_base(adapter, fingerprint(config, lambda name: source.read(name, tuple(map(slice, self.parameters[name][0])))))

    def read(self, name: str, index: Index) -> np.ndarray:
        base = self.source.read(name, index)
        if name not in self.adapter:
            return base
        a, b, scale = self.adapter[name]
        stack, inputs = self.weights[name].sides or (0, 1)
        a_EKr = a[index[: stack + inputs]].astype(np.float32)
        b_ErN = b[(*index[:stack], slice(None), *index[stack + inputs :])].astype(np.float32)
        lead, rank, K = a_EKr.shape[:stack], a_EKr.shape[-1], math.prod(a_EKr.shape[stack:-1])
        product = a_EKr.reshape(*lead, K, rank) @ b_ErN.reshape(*lead, rank, -1)
        return (base.astype(np.float32) + np.float32(scale) * product.reshape(base.shape)).astype(base.dtype)
