"""How fast a model is served here: batches of one size, requests that come at random, and what share of the machine that is."""

from maverick_jax.bench.measurement import measure
from maverick_jax.bench.report import Report

__all__ = ["Report", "measure"]
