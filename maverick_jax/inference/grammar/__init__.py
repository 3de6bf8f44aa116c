"""Structured output: the form that an answer shall have, and what may come next in it."""

from maverick_jax.inference.grammar.form import Grammar
from maverick_jax.inference.grammar.matcher import Grammars, Matcher

__all__ = ["Grammar", "Grammars", "Matcher"]
