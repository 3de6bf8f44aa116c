"""Checkpoints from PyTorch to Orbax and back, and what is in them."""

from maverick_jax.convert.huggingface import HuggingFace, open_huggingface
from maverick_jax.convert.inventory import Inventory, inspect, table
from maverick_jax.convert.model_directory import MANIFEST, PARAMS, ModelDirectory, open_model_directory
from maverick_jax.convert.to_orbax import convert
from maverick_jax.convert.to_pytorch import export

__all__ = [
    "MANIFEST",
    "PARAMS",
    "HuggingFace",
    "Inventory",
    "ModelDirectory",
    "convert",
    "export",
    "inspect",
    "open_huggingface",
    "open_model_directory",
    "table",
]
