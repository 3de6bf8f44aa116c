"""Calls of tools as a model may write them: lists in Python, JSON objects in their variations; and what a reader makes of a text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from maverick_jax.serving.tools.choice import Function, tools
from maverick_jax.serving.tools.reader import CallReader

Calls = Sequence[tuple[str, dict[str, Any]]]


def as_python(calls: Calls) -> str:
    """`[f(a=1), g()]`; names that are no argument's go through a dictionary."""

    def arguments(values: dict[str, Any]) -> str:
        plain = {name: value for name, value in values.items() if name.isidentifier()}
        rest = {name: value for name, value in values.items() if not name.isidentifier()}
        return ", ".join([*(f"{name}={value!r}" for name, value in plain.items()), *([f"**{rest!r}"] if rest else [])])

    return "[" + ", ".join(f"{name}({arguments(values)})" for name, values in calls) + "]"


def as_json(calls: Calls) -> str:
    """One behind the other, as the releases are told to write them."""
    return "; ".join(json.dumps({"type": "function", "name": name, "parameters": values}) for name, values in calls)


def as_json_list(calls: Calls) -> str:
    """In a list, as other models write them, the arguments in front and indented."""
    return json.dumps([{"arguments": values, "name": name} for name, values in calls], indent=2, ensure_ascii=False)


WRITERS = {"python": as_python, "json": as_json, "list": as_json_list}


def read(text: str, functions: Iterable[Function], cuts: Iterable[int] = (), **settings: Any) -> tuple[str, list[tuple[str, str]]]:
    """What is said besides the calls, and names and arguments of these, of a text that comes in pieces."""
    reader = CallReader(tools(list(functions), "auto", **settings))
    places = [0, *cuts, len(text)]
    found = [part for start, end in itertools.pairwise(places) for part in reader.push(text[start:end])] + reader.flush()
    calls: list[list[str]] = []
    for part in found:
        if not isinstance(part, str):
            if part.name:
                assert part.id.startswith("call_")
                calls.append([part.name, ""])
            calls[part.call][1] += part.arguments
    return "".join(part for part in found if isinstance(part, str)), [(name, arguments) for name, arguments in calls]
