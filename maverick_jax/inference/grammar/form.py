"""The form that an answer shall have: a JSON schema, a regular expression, a grammar or a list of choices.

Plain data, checked as far as one can without compiling it; `matcher.py` compiles and follows it.
"""

from __future__ import annotations

import dataclasses
import json
import urllib.parse
from collections.abc import Sequence
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import listed, shown
from maverick_jax.json_file import parse_json

LONGEST = 1 << 18  # characters of a form
PASSES = 100  # over the references of a schema
BOOLEANS: dict[bool, dict[str, Any]] = {True: {}, False: {"enum": []}}  # schemas as objects


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar:
    """The form that an answer shall have: one of these, and JSON is as compact or as indented as the model likes.

    Attributes:
      json_schema: a JSON schema, as a dict, a bool or their text. What llguidance does not implement is refused, not ignored;
        of `{"x-guidance": …}` it takes options of its own.
      json_object: any JSON object.
      regex: a regular expression for the whole answer, without look-around (syntax of Rust's `regex`).
      lark: a grammar in llguidance's Lark, or in llama.cpp's GBNF.
      choice: the texts of which the answer is one.

    Raises:
      UserError: none or several of them, or a value of another type.
    """

    json_schema: dict[str, Any] | bool | str | None = None
    json_object: bool = False
    regex: str | None = None
    lark: str | None = None
    choice: Sequence[str] | None = None

    def __post_init__(self):
        if len(given := self._given()) != 1:
            kinds = ", ".join(field.name for field in dataclasses.fields(self))
            raise UserError(f"a Grammar has {' and '.join(given) or 'no form'}: give one of {kinds}.")
        kind = given[0]
        object.__setattr__(self, kind, _CHECKS[kind](kind, getattr(self, kind)))
        if (length := len(self.text)) > LONGEST:
            raise UserError(f"{kind} has {length:,} characters, more than the {LONGEST:,} that a form may have: make it smaller.")

    @property
    def kind(self) -> str:
        """Which of the forms it is."""
        return self._given()[0]

    @property
    def text(self) -> str:
        """The form as llguidance's source: JSON text, an expression, or a grammar."""
        value = getattr(self, self.kind)
        if self.kind == "choice":  # one token of the grammar: with a rule for each text, thirty thousand of them take seconds
            return "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, value))
        return '{"type":"object"}' if self.kind == "json_object" else value

    def _given(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not field.default]


def _schema(kind: str, value: Any) -> str:
    try:
        schema = parse_json(value.encode()) if isinstance(value, str) else value
        if isinstance(schema, bool):
            schema = BOOLEANS[schema]
        if isinstance(schema, dict):
            return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{kind} is not JSON ({error}): give a JSON schema as a dict or as text.") from error
    raise UserError(f"{kind} is {shown(value)}: give a JSON schema as a dict or as text (of a pydantic model: model_json_schema()).")


def _flag(kind: str, value: Any) -> bool:
    if value is not True:
        raise UserError(f"{kind} is {shown(value)}: it must be True or False.")
    return value


def _text(kind: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{kind} is {shown(value)}: expected a text of at least one character.")
    return _spelled(kind, value)


def _texts(kind: str, value: Any) -> tuple[str, ...]:
    items = listed(value)
    if not items or not all(isinstance(item, str) for item in items):
        raise UserError(f"{kind} is {shown(value)}: expected a list of texts, one at least.")
    return tuple(_spelled(kind, item) for item in items)


def _spelled(kind: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{kind} holds half a character at {error.start} of {shown(text)}: it was cut apart or decoded wrongly.") from error
    return text


_CHECKS = dict(json_schema=_schema, json_object=_flag, regex=_text, lark=_text, choice=_texts)


def can_end(schema: Any) -> bool:
    """Whether any finite answer has a JSON schema that llguidance takes. A node that requires the next node, and that one the next, has
    none: it would be written until there is no room."""
    targets = {name: _target(schema, name) for name in _references(schema)}
    ending: set[str] = set()
    for _ in range(PASSES):
        known = len(ending)
        for name in reversed(targets):  # what is referred to mostly comes behind
            if name not in ending and _ends(targets[name], ending):
                ending.add(name)
        if len(ending) == known:
            return _ends(schema, ending)
    return True


def _ends(schema: Any, ending: set[str]) -> bool:
    """The same of a part, if the references in `ending` have finite answers."""
    if not isinstance(schema, dict):
        return True
    needed = list(schema.get("allOf", []))
    if schema.get("type") == "object":
        needed += [part for name, part in schema.get("properties", {}).items() if name in schema.get("required", [])]
    if schema.get("type") == "array" and (least := schema.get("minItems", 0)):
        first = schema.get("prefixItems", [])[:least]
        needed += first + [schema.get("items", True)] * (least > len(first))
    either = [schema[name] for name in ("anyOf", "oneOf") if name in schema]
    return (
        ("$ref" not in schema or schema["$ref"] in ending)
        and all(_ends(part, ending) for part in needed)
        and all(any(_ends(part, ending) for part in parts) for parts in either)
    )


def _references(part: Any) -> dict[str, None]:
    """Every `$ref` in it, in order."""
    found: dict[str, None] = {}
    if isinstance(part, dict) and isinstance(name := part.get("$ref"), str):
        found[name] = None
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        found |= _references(inner)
    return found


def _target(schema: Any, name: str) -> Any:
    """What a JSON pointer points at; of any other reference nothing is known, so that it counts as finite."""
    beginning, *steps = urllib.parse.unquote(name).split("/")
    try:
        for step in steps:
            step = step.replace("~1", "/").replace("~0", "~")
            schema = schema[int(step) if isinstance(schema, list) else step]
    except (LookupError, TypeError, ValueError):
        return True
    return schema if beginning == "#" else True
