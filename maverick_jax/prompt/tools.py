"""What a model is told of a Python function that it may call: name, purpose and arguments as a JSON schema.

Source: transformers, `get_json_schema` (behaviour, no code), with which the tests compare.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union

from PIL import Image

from maverick_jax.errors import UserError

SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
TYPES = SCALARS | {list: "array", tuple: "array", dict: "object", Image.Image: "image"}
SECTIONS = re.compile(r"Args:|Returns:|Raises:")
ARGUMENT = re.compile(r"([ \t]*)(\w+):(.*)")
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schema(tool: Any) -> Mapping[str, Any]:
    """The schema of a tool: a dictionary as it is, a function's from its type hints and docstring.

    Raises:
      UserError: neither, or a function without the type hints or descriptions that a schema needs.
    """
    if isinstance(tool, Mapping):
        return tool
    if not inspect.isfunction(tool) and not inspect.ismethod(tool):
        raise UserError(f"tool {tool!r} is neither a JSON schema nor a function: give one of them.")
    description, described, returns = _read_docstring(tool)
    name = tool.__name__
    try:
        hints = typing.get_type_hints(tool)
    except Exception as error:  # whatever a name in quotes evaluates to
        raise UserError(f"the type hints of tool {name} cannot be read ({error}): import what they name.") from error
    parameters = inspect.signature(tool).parameters
    receiver = next((p for i, p in enumerate(parameters) if i == 0 and p in ("self", "cls") and p not in hints), None)
    properties = {}
    for argument in parameters:
        if argument == receiver:
            continue
        if argument not in hints:
            raise UserError(f"argument {argument} of tool {name} has no type hint: add one.")
        if argument not in described:
            raise UserError(f"the docstring of tool {name} does not describe argument {argument}: add it under 'Args:'.")
        properties[argument] = _schema(hints[argument], f"{argument} of tool {name}") | _described(described[argument], name)
    required = [p for p in properties if parameters[p].default is inspect.Parameter.empty]
    function = {
        "name": name,
        "description": description,
        "parameters": {"type": "object", "properties": properties} | ({"required": required} if required else {}),
    }
    if "return" in hints:
        with contextlib.suppress(UserError):  # the model does not write results: a type without a schema is left out
            described_as = {} if returns is None else {"description": returns}
            function["return"] = _schema(hints["return"], f"the result of tool {name}") | described_as
    return {"type": "function", "function": function}


def _described(text: str, tool: str) -> dict[str, Any]:
    choices = CHOICES.search(text)
    if not choices:
        return {"description": text}
    try:
        values = json.loads(choices.group(1))
    except ValueError as error:
        raise UserError(f'the choices {choices.group(1)} in the docstring of tool {tool} are no JSON list: write ["a", "b"].') from error
    return {"enum": [v.strip() if isinstance(v, str) else v for v in values], "description": text[: choices.start()].strip()}


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if isinstance(hint, type) and origin is None:
        if issubclass(hint, enum.Enum):
            return _one_of([member.value for member in hint], where)
        if hint in TYPES:
            return {"type": TYPES[hint]}
    if origin is Literal:
        return _one_of(list(args), where)
    if origin in (Union, types.UnionType):
        return _any_of([_schema(arg, where) for arg in args if arg is not type(None)]) | ({"nullable": True} if type(None) in args else {})
    if origin is list:
        return {"type": "array", "items": _schema(args[0], where)}
    if origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_schema(arg, where) for arg in args]}
    if origin is dict and len(args) == 2:
        return {"type": "object", "additionalProperties": _schema(args[1], where)}
    raise UserError(
        f"{where} has the type {getattr(hint, '__name__', hint)}, which has no JSON schema: use int, float, str, bool, an Enum, Literal, "
        "or list, tuple, dict and unions of those, or write the schema by hand."
    )


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if len(schemas) == 1:
        return schemas[0]
    if any(schema.keys() != {"type"} or not isinstance(schema["type"], str) for schema in schemas):
        return {"anyOf": schemas}
    names = sorted({schema["type"] for schema in schemas})
    return {"type": names[0] if len(names) == 1 else names}


def _one_of(values: list[Any], where: str) -> dict[str, Any]:
    if not values or any(type(value) not in SCALARS for value in values):
        raise UserError(f"{where} may be one of {values}: a schema takes texts, numbers, booleans and None.")
    names = list(dict.fromkeys(SCALARS[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _read_docstring(tool: Callable[..., Any]) -> tuple[str, dict[str, str], str | None]:
    """Purpose, arguments and result as a docstring in Google's style describes them."""
    text = (inspect.getdoc(tool) or "").strip()
    if not text:
        raise UserError(f"tool {tool.__name__} has no docstring: say what it does, and describe its arguments under 'Args:'.")
    first = SECTIONS.search(text)
    arguments = re.search(r"\n\s*Args:\n(.*?)\s*(?:Returns:|Raises:|\Z)", text, re.DOTALL)
    returns = re.search(r"\n\s*Returns:\n\s*(.*?)\s*(?:Raises:|\Z)", text, re.DOTALL)
    described: dict[str, list[str]] = {}
    name, indent = None, ""
    for line in arguments.group(1).split("\n") if arguments else []:
        begins = ARGUMENT.match(line)
        if begins and not (name and line.startswith((indent + " ", indent + "\t"))):
            indent, name, line = begins.groups()
            described[name] = []
        if name and line.strip():
            described[name].append(line.strip())
    return (
        text[: first.start()].strip() if first else text,
        {name: " ".join(lines) for name, lines in described.items()},
        returns.group(1).strip() if returns else None,
    )
