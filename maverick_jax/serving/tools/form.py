"""The form of an answer that must be a call: its grammar lets nothing else come.

Calls are JSON, a line each, their name first, as `reader.py` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from maverick_jax.inference.grammar import Grammar
from maverick_jax.inference.grammar.matcher import BLANK
from maverick_jax.serving.tools.choice import Function, Tools


def form_of(tools: Tools, answer: Grammar | None) -> Grammar | None:
    """The form of an answer that may or must call tools.

    Args:
      answer: the form that it has where it calls none.
    """
    if not tools.allowed or not (tools.required or answer is not None):
        return answer
    rules = _calls(tools.callable, tools.parallel)
    if tools.required or answer is None:
        return Grammar(lark="\n".join(["start: calls", *rules]))
    if answer.kind in ("json_schema", "json_object"):
        return Grammar(lark="\n".join(["start: calls | answer", f"answer: {_json(json.loads(answer.text))}", *rules]))
    return answer  # an expression or a grammar is the whole answer


def _calls(functions: Sequence[Function], parallel: bool) -> list[str]:
    rules = ['calls: call ("\\n" call)*' if parallel else "calls: call"]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        begin = json.dumps(f'{{"name": {json.dumps(function.name)}, "parameters": ')
        rules.append(f'call_{i}: {begin} {_json(_closed(function.parameters))} "}}"')
    return rules


def _json(schema: dict[str, Any]) -> str:
    """Text of a schema, with no more blanks than `Grammar(json_schema=…)` lets come."""
    options = schema.get("x-guidance")
    return f"%json {json.dumps(schema | {'x-guidance': {'whitespace_pattern': BLANK} | (options if isinstance(options, dict) else {})})}"


def _closed(parameters: dict[str, Any]) -> dict[str, Any]:
    """An object of the arguments that there are, and no others."""
    return {"type": "object", "properties": {}, "additionalProperties": False} | parameters
