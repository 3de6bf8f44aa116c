"""A call outside `jit`: compiled once per shape, and the program kept.

A program takes the weights as arguments: it holds none of them alive, and serves whatever values a model has by then.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax.core import Tracer

from maverick_jax.errors import UserError

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """A module without its parameters, as a static argument of programs.

    Equal ones are one object (`take_apart`): to find a call's program, hundreds of nodes need not be compared.
    """

    tree: Any

    def __call__(self, leaves: list[Any]) -> Any:
        """The module with these parameters."""
        return jax.tree.unflatten(self.tree, leaves)


_one_of_a_kind = functools.cache(Structure)


def take_apart(module: Any) -> tuple[Structure, list[Any]]:
    """A module's structure, and its parameters in the order that this takes."""
    leaves, tree = jax.tree.flatten(module)  # `nnx.split` would take ten times as long
    return _one_of_a_kind(tree), leaves


def compiled(method: Method) -> Method:
    """A method of a module whose call is one program. Under a transformation of jax it is traced where it stands.

    Args:
      method: of arrays and trees of arrays alone, passed by position. None of them is donated.

    Raises:
      UserError: (the method made of it) the module is abstract.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def program(structure: Structure, leaves: list[Any], arguments: tuple[Any, ...]) -> Any:
        return method(structure(leaves), *arguments)

    @functools.wraps(method)
    def call(module: Any, *arguments: Any) -> Any:
        structure, leaves = take_apart(module)
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
