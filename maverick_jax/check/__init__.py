"""Is this machine fit for a model: what is installed, kernels against float64, speeds, and what the devices exchange."""

from maverick_jax.check.report import Report as Report
from maverick_jax.check.report import check as check

__all__ = ["Report", "check"]
