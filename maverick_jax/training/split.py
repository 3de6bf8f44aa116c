"""A model apart: what is learned, by name; what is not; and how they make a model again."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from maverick_jax.errors import UserError
from maverick_jax.model import Llama4, parameter_name

Leaves = dict[str, jax.Array]


class Split:
    """Attributes:
    learned, frozen: every parameter, by dotted name.
    """

    def __init__(self, model: Llama4, *, frozen: Sequence[str] = (), master: bool = False):
        """Adapters are what is learned, in a model that has some; else all but quantized weights.

        Args:
          frozen: patterns of names that are not learned either, such as "vision.*".
          master: keep what is learned in float32; a step computes with the dtype that the model has it in.

        Raises:
          UserError: a pattern that fits nothing, or nothing left to learn.
        """
        self.graphdef, state = nnx.split(model)
        leaves = {parameter_name(path): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
        if idle := [pattern for pattern in frozen if not fnmatch.filter(leaves, pattern)]:
            raise UserError(
                f"nothing is called {idle[0]!r}, which is to stay as it is: parameters are called {next(iter(leaves))} and so on."
            )
        adapted = any(isinstance(leaf, nnx.LoRAParam) for _, leaf in leaves.values())
        kind = nnx.LoRAParam if adapted else nnx.Param
        chosen = [
            name
            for name, (_, leaf) in leaves.items()
            if isinstance(leaf, kind) and not name.endswith((".values", ".scales")) and not any(fnmatch.fnmatch(name, p) for p in frozen)
        ]
        if not chosen:
            raise UserError("nothing is left to be learned: name fewer parameters that stay as they are, or give the model adapters.")
        values: Leaves = {name: leaf.get_value() for name, (_, leaf) in leaves.items()}
        self._computes_in = {} if adapted else {name: values[name].dtype for name in chosen}
        self._leaves = {name: (path, leaf.replace(None)) for name, (path, leaf) in leaves.items()}  # which hold no array alive
        self.learned: Leaves = {name: values[name].astype(jnp.float32) if master else values[name] for name in chosen}
        self.frozen: Leaves = {name: value for name, value in values.items() if name not in self.learned}

    def model(self, learned: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array]) -> Llama4:
        """The model of these values, which may be traced ones."""
        flat = []
        for name, (path, leaf) in self._leaves.items():
            value = learned[name].astype(self._computes_in.get(name, learned[name].dtype)) if name in learned else frozen[name]
            flat.append((path, leaf.replace(value)))
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))
