"""The fields of a JSON object that a client sent, read by name. A null is a field that is not there.

Whoever reads says so what is known: what is left is unknown, and its reader decides what that means.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import Range, listed, shown, whole_numbers


class Fields:
    """A JSON object.

    Args:
      values: as it was parsed.
      name: what it is, for messages.

    Raises:
      UserError: no object.
    """

    def __init__(self, values: Any, name: str):
        if not isinstance(values, dict):
            raise UserError(f"{name} is {shown(values)}: expected a JSON object.")
        self.name = name
        self._values, self._known, self._notes = values, set[str](), list[str]()

    def get(self, field: str, default: Any = None) -> Any:
        """Its value, of any kind."""
        self._known.add(field)
        value = self._values.get(field)
        return default if value is None else value

    def has(self, field: str) -> bool:
        return self.get(field) is not None

    def flag(self, field: str, default: bool = False) -> bool:
        value = self.get(field, default)
        if not isinstance(value, bool):
            raise UserError(f"{field} is {shown(value)}: it must be true or false.")
        return value

    def text(self, field: str, default: str = "") -> str:
        value = self.get(field, default)
        if not isinstance(value, str):
            raise UserError(f"{field} is {shown(value)}: expected a text.")
        return value

    def items(self, field: str) -> list[Any]:
        """Of a list; none where there is none."""
        value = self.get(field, [])
        if not isinstance(value, list):
            raise UserError(f"{field} is {shown(value)}: expected a list.")
        return value

    def objects(self, field: str) -> list[dict[str, Any]]:
        """Of a list."""
        items = self.items(field)
        for wrong in (item for item in items if not isinstance(item, dict)):
            raise UserError(f"{field} holds {shown(wrong)}: expected objects.")
        return items

    def number(self, field: str, allowed: Range, default: Any = None) -> Any:
        value = self.get(field)
        return default if value is None else allowed.check(field, value)

    def ids(self, field: str) -> list[int]:
        """Of tokens."""
        return token_ids(self.get(field, []), field)

    def ignore(self, fields: Collection[str]) -> None:
        """They are known, and have no effect."""
        self._known.update(fields)

    def note(self, line: str) -> None:
        """A part of a field has no effect."""
        self._notes.append(line)

    def unknown(self) -> tuple[str, ...]:
        """What has no effect, a line each: what was noted, and fields that nobody has asked for, with what may be meant."""
        lines = list(self._notes)
        for field, value in self._values.items():
            if field not in self._known and value is not None:
                near = difflib.get_close_matches(field, self._known, n=1)
                lines.append(f"{field!a} is no field of {self.name}: {f'did you mean {near[0]}?' if near else 'leave it out.'}")
        return tuple(lines)


def token_ids(values: Any, name: str) -> list[int]:
    """
    Raises:
      UserError: no list of whole numbers.
    """
    if (items := listed(values)) is None:
        raise UserError(f"{name} is {shown(values)}: expected a list of token ids.")
    return whole_numbers(items, name)
