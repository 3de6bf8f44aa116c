"""A call outside `jit`: compiled once per shape, and the program kept.

A program takes the weights as arguments: it holds none of them alive, and serves whatever values a model has by then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax.core import Tracer

from maverick_jax.errors import UserError

Method = TypeVar("Method", bound=Callable[..., Any])


def compiled(method: Method) -> Method:
    """A method of a module whose call is one program. Under a transformation of jax it is traced where it stands.

    Args:
      method: of arrays and trees of arrays alone, passed by position. None of them is donated.

    Raises:
      UserError: (the method made of it) the module is abstract.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def program(structure: Any, leaves: list[Any], arguments: tuple[Any, ...]) -> Any:
        return method(jax.tree.unflatten(structure, leaves), *arguments)

    @functools.wraps(method)
    def call(module: Any, *arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(module)  # `nnx.split` would take ten times as long
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            raise UserError("this model has no weights, get_abstract_model only describes them: open one with maverick_jax.load.")
        if any(isinstance(leaf, Tracer) for leaf in (*leaves, *jax.tree.leaves(arguments))):
            return method(module, *arguments)
        return _waited_for(program(structure, leaves, arguments))

    return cast(Method, call)


def _waited_for(result: Any) -> Any:
    """Simulated devices share the threads of one process: with several calls in flight, each may wait in another one's collective."""
    first = jax.tree.leaves(result)[0]
    several = not isinstance(first, Tracer) and len(first.devices()) > 1
    return jax.block_until_ready(result) if several and _is_cpu(first) else result


def _is_cpu(array: jax.Array) -> bool:
    return next(iter(array.devices())).platform == "cpu"
