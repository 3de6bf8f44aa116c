"""Will it fit, how fast can it be: memory per device and a roofline, for devices that need not be there."""

from maverick_jax.plan.planner import Plan, make_plan, search

__all__ = ["Plan", "make_plan", "search"]
