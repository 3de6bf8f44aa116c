"""Will it fit, how fast can it be: memory per device and a roofline, for devices that need not be there."""

from maverick_jax.plan.planner import make_plan, search
from maverick_jax.plan.report import Plan

__all__ = ["Plan", "make_plan", "search"]
