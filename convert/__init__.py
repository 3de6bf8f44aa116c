"""Checkpoints from PyTorch to Orbax and back, and what is in them."""

from maverick_jax.convert.companions import PARAMS
from maverick_jax.convert.inventory import Inventory, inspect, table
from maverick_jax.convert.manifest import MANIFEST
from maverick_jax.convert.model_directory import ModelDirectory, open_model_directory
from maverick_jax.convert.recognize import open_source
from maverick_jax.convert.source import Source
from maverick_jax.convert.to_orbax import Summary, convert
from maverick_jax.convert.to_pytorch import export

__all__ = [
    "MANIFEST",
    "PARAMS",
    "Inventory",
    "ModelDirectory",
    "Source",
    "Summary",
    "convert",
    "export",
    "inspect",
    "open_model_directory",
    "open_source",
    "table",
]
