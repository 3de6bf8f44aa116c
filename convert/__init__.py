"""Checkpoints from PyTorch to Orbax and back, and what is in them."""

from maverick_jax.convert.build.model_directory import ModelDirectory, open_model_directory
from maverick_jax.convert.build.to_orbax import Summary, convert
from maverick_jax.convert.build.to_pytorch import export
from maverick_jax.convert.formats.companions import MANIFEST, PARAMS
from maverick_jax.convert.formats.recognize import open_source
from maverick_jax.convert.formats.source import Source
from maverick_jax.convert.proof.inventory import Inventory, inspect, table

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
