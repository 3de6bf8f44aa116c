"""Which tools an answer may call, and which it must."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import shown
from maverick_jax.json_file import parse_json

LONGEST_NAME = 256


@dataclasses.dataclass(frozen=True)
class Function:
    """A tool.

    Attributes:
      parameters: a JSON schema of its arguments.
    """

    name: str
    description: str | None = None
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def schema(self) -> dict[str, Any]:
        """As chat templates read it."""
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": self.parameters}}


@dataclasses.dataclass(frozen=True)
class Tools:
    """What an answer may call.

    Attributes:
      functions: that the model is told of.
      allowed: names of those that it may call; none of them where it shall not.
      required: whether it must call one of these.
      parallel: whether it may call several.
    """

    functions: tuple[Function, ...] = ()
    allowed: frozenset[str] = frozenset()
    required: bool = False
    parallel: bool = True

    @property
    def schemas(self) -> list[dict[str, Any]] | None:
        """For a chat template; None where nothing may be called, which is the answer without tools."""
        return [function.schema for function in self.functions] if self.allowed else None

    @property
    def callable(self) -> list[Function]:
        return [function for function in self.functions if function.name in self.allowed]


NO_TOOLS = Tools()


def function(values: Any, where: str, *, parameters: str = "parameters") -> Function:
    """A tool of an object that has its `name`, `description` and, under a name of its own, its `parameters`.

    Raises:
      UserError: it has no name, or parameters of another kind.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} holds {shown(values)}: expected objects with a name.")
    name, description, schema = (values.get(key) for key in ("name", "description", parameters))
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise UserError(f"{where} has the name {shown(name)}: expected a text of at most {LONGEST_NAME} characters.")
    if not isinstance(description, str | None):
        raise UserError(f"{where}: the description of {name} is {shown(description)}: expected a text.")
    if not isinstance(schema, dict | None):
        raise UserError(f"{where}: the {parameters} of {name} are {shown(schema)}: expected a JSON schema.")
    return Function(name, description, schema or {})


def tools(functions: Sequence[Function], mode: str, named: Sequence[str] | None = None, *, parallel: bool = True) -> Tools:
    """The choice among functions.

    Args:
      mode: "none", "auto" or "required".
      named: those that it is about; None for all.

    Raises:
      UserError: two functions of one name, one that is chosen and not there, or none of which one must be called.
    """
    names = [function.name for function in functions]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"tools has two functions of the name {shown(twice)}: give each its own.")
    if (missing := next((name for name in named or () if name not in names), None)) is not None:
        raise UserError(f"tool_choice names {shown(missing)}, and tools has {', '.join(map(shown, names)) or 'none'}.")
    allowed = frozenset(() if mode == "none" else names if named is None else named)
    if mode == "required" and not allowed:
        raise UserError("tool_choice asks for a call, and there is no tool to call.")
    return Tools(tuple(functions), allowed, mode == "required", parallel)


def arguments_of(text: str) -> dict[str, Any]:
    """The arguments of a call that a client sends back, which OpenAI writes as JSON in a text.

    Raises:
      UserError: no JSON object.
    """
    try:
        arguments = parse_json(text.encode("utf-8", "surrogatepass")) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"the arguments of a tool call are no JSON ({error}): send them as the model wrote them.") from error
    if not isinstance(arguments, dict):
        raise UserError(f"the arguments of a tool call are {shown(arguments)}: expected a JSON object.")
    return arguments
