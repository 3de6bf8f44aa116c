"""Llama 4 as Flax NNX modules. They know logical axis names; no mesh and no files."""

from maverick_jax.model.llama4 import Llama4, get_abstract_model
from maverick_jax.model.parameter import parameter_name

__all__ = ["Llama4", "get_abstract_model", "parameter_name"]
