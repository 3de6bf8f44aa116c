"""Will training fit, and how fast can it be: what is learned, what a gradient keeps, and the limit of a step."""

from maverick_jax.plan.training.planner import make_training_plan
from maverick_jax.plan.training.report import TrainingPlan

__all__ = ["TrainingPlan", "make_training_plan"]
