"""A model directory beside transformers, stage by stage: both sides run, and what they hold is compared."""

from maverick_jax.convert.proof.compare.comparison import TOLERANCE, Comparison, Row, compare

__all__ = ["TOLERANCE", "Comparison", "Row", "compare"]
