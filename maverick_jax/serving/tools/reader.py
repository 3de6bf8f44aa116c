"""Calls of tools in what a model writes, as they come: argument by argument.

Llama 4 writes calls as a list in Python, `[weather(city="Paris"), time()]`, or as JSON, `{"name": "weather", "parameters": {"city":
"Paris"}}`, alone, one behind the other or in a list. Calls begin an answer or a line; what is no call of a tool that there is stays
text. A value is read with `ast` and never evaluated; one that is no value, such as `2 + x`, is its text.

Always: what comes out does not depend on how the text was cut.
Source: Llama 4 reference, `models/llama4/prompt_format.md`; spec section 4.3.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import uuid
import warnings
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

from maverick_jax.serving.tools.choice import Tools

CONSTANTS = {"true": True, "false": False, "null": None}  # JSON's names, in Python
OPEN, CLOSE, QUOTES = "([{", ")]}", "\"'"
ENDS_NAME = frozenset(" \t\n=,()[]{}\"'")
ARGUMENTS = ("parameters", "arguments")
BEGINS_VALUE = ("*", *QUOTES, *OPEN)
Result = TypeVar("Result")
Reading = Generator[None, None, Result]  # it waits at each `yield` for more text


class CallDelta(NamedTuple):
    """A part of a call.

    Attributes:
      call: which one of the answer, from 0.
      id, name: with its first part; later they are empty.
      arguments: more of the JSON object that they are.
    """

    call: int
    id: str
    name: str
    arguments: str


class NoCall(Exception):
    """What was taken for a call is none."""


class CallReader:
    """Tells calls from text.

    Attributes:
      count: of calls so far.
    """

    def __init__(self, tools: Tools):
        self._parameters = {function.name: _properties(function.parameters) for function in tools.callable}
        self._parallel = tools.parallel
        self._text, self._at, self._ended = "", 0, False
        self._held: list[str] = []  # what was read and is not yet certain
        self._inside = False  # of calls, whatever follows
        self.count = 0
        self._out: list[str | CallDelta] = []
        self._reading = self._read()

    def push(self, text: str) -> list[str | CallDelta]:
        """What is certain once this text has come: portions of text, and of calls."""
        self._text, self._at = self._text[self._at :] + text, 0
        next(self._reading, None)
        out, self._out = self._out, []
        return out

    def flush(self) -> list[str | CallDelta]:
        """What is certain once no more comes."""
        self._ended = True
        return self.push("")

    # The text, character by character; "" is its end.

    def _peek(self) -> Reading[str]:
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def _take(self) -> Reading[str]:
        char = yield from self._peek()
        if not char:
            raise NoCall
        self._at += 1
        self._held.append(char)
        return char

    def _blank(self) -> Reading[str]:
        """What comes behind blanks."""
        while (char := (yield from self._peek())).isspace():
            yield from self._take()
        return char

    def _expect(self, wanted: str) -> Reading[str]:
        if (yield from self._blank()) not in tuple(wanted):
            raise NoCall
        return (yield from self._take())

    def _skip(self, wanted: str) -> Reading[bool]:
        """Whether it was there."""
        if there := (yield from self._blank()) == wanted:
            yield from self._take()
        return there

    def _name(self) -> Reading[str]:
        yield from self._blank()
        name = ""
        while (char := (yield from self._peek())) and char not in ENDS_NAME:
            name += yield from self._take()
        return name

    def _value(self, ends: str) -> Reading[str]:
        """What stands before one of these characters, outside of brackets and quotes."""
        text, depth = "", 0
        while (char := (yield from self._peek())) not in tuple(ends) or depth:
            if char and char in QUOTES:
                text += yield from self._quoted()
                continue
            depth += (char in OPEN) - (char in CLOSE) if char else 0
            if depth < 0:
                raise NoCall
            text += yield from self._take()
        return text

    def _quoted(self) -> Reading[str]:
        text = quote = yield from self._take()
        if (yield from self._peek()) == quote:
            text += yield from self._take()
            if (yield from self._peek()) != quote:
                return text
            text += yield from self._take()
        needed, run = len(text), 0
        while run < needed:
            char = yield from self._take()
            run = run + 1 if char == quote else 0
            text += char
            if char == "\\":
                text += yield from self._take()
        return text

    # What is in it.

    def _read(self) -> Reading[None]:
        while (yield from self._peek()):
            self._held, self._inside = [], False
            try:
                yield from self._maybe_calls()
            except NoCall:
                if not (self._inside and self._at == len(self._text)):  # an argument that was cut off is nobody's text
                    self._say("".join(self._held))
                yield from self._line()

    def _say(self, text: str) -> None:
        if text:
            self._out.append(text)

    def _line(self) -> Reading[None]:
        """Text to the end of a line."""
        while (yield from self._peek()):
            end = self._text.find("\n", self._at) + 1
            portion = self._text[self._at : end or len(self._text)]
            self._at += len(portion)
            self._say(portion)
            if end:
                return

    def _maybe_calls(self) -> Reading[None]:
        """Calls where a line begins.

        Raises:
          NoCall: there are none, or something stands where more of one should.
        """
        if self.count and not self._parallel:
            raise NoCall
        if (yield from self._skip("[")):
            yield from self._listed(self._json_call if (yield from self._blank()) == "{" else self._python_call)
            yield from self._expect("]")
        else:
            yield from self._json_call()
        while (char := (yield from self._peek())) and (char.isspace() or char in ";,"):
            self._at += 1  # between calls, or behind the last one

    def _listed(self, read: Callable[[], Reading[None]]) -> Reading[None]:
        yield from read()
        while self._parallel and (yield from self._skip(",")):
            yield from read()

    def _python_call(self) -> Reading[None]:
        name = yield from self._name()
        yield from self._expect("(")
        call = self._begin(name)
        while not (yield from self._skip(")")):
            name = "" if (yield from self._blank()) in BEGINS_VALUE else (yield from self._name())
            if name and (yield from self._skip("=")):
                call.add(name, _python_value((yield from self._value(",)"))))
            else:
                call.add_unnamed(name + (yield from self._value(",)")))
            yield from self._skip(",")
        call.end()

    def _json_call(self) -> Reading[None]:
        """An object with a name and arguments, in any order."""
        name, arguments, call = "", "{}", None
        yield from self._expect("{")
        while not (yield from self._skip("}")):
            key = _json_value((yield from self._value(":")))
            yield from self._expect(":")
            if key in ARGUMENTS and name and (yield from self._blank()) == "{":
                call = self._begin(name)
                yield from self._json_arguments(call)
            elif (value := (yield from self._value(",}"))) and key in ARGUMENTS:
                arguments = value
            elif key == "name":
                name = _json_value(value)
            elif key not in ("type", "id") and call is None:
                raise NoCall
            yield from self._skip(",")
        if call is None:
            members = _members(arguments)
            call = self._begin(name)
            for key, value in members.items():
                call.add(key, value)
        call.end()

    def _json_arguments(self, call: _Call) -> Reading[None]:
        yield from self._expect("{")
        while not (yield from self._skip("}")):
            key = _json_value((yield from self._value(":")))
            yield from self._expect(":")
            call.add(str(key), _json_value((yield from self._value(",}"))))
            yield from self._skip(",")

    def _begin(self, name: Any) -> _Call:
        """From here on it is a call, whatever follows."""
        if name not in self._parameters:
            raise NoCall
        self._inside = True
        self.count += 1
        return _Call(self.count - 1, name, self._parameters[name], self._write)

    def _write(self, delta: CallDelta) -> None:
        self._out.append(delta)
        self._held = []


class _Call:
    """A call that is being written."""

    def __init__(self, index: int, name: str, parameters: list[str], write: Callable[[CallDelta], None]):
        self._index, self._parameters, self._write = index, parameters, write
        self._count = 0
        write(CallDelta(index, f"call_{uuid.uuid4().hex[:24]}", name, ""))

    def add(self, name: str, value: Any) -> None:
        begin = ", " if self._count else "{"
        self._count += 1
        self._write(CallDelta(self._index, "", "", f"{begin}{json.dumps(name)}: {json.dumps(value)}"))

    def add_unnamed(self, text: str) -> None:
        """By its place, or several by their names: `**{...}`."""
        if text.startswith("**"):
            for name, value in _members(text[2:]).items():
                self.add(name, value)
        else:
            place = self._count
            self.add(self._parameters[place] if place < len(self._parameters) else f"argument_{place + 1}", _python_value(text))

    def end(self) -> None:
        self._write(CallDelta(self._index, "", "", "}" if self._count else "{}"))


def _properties(parameters: dict[str, Any]) -> list[str]:
    properties = parameters.get("properties")
    return list(properties) if isinstance(properties, dict) else []


def _python_value(text: str) -> Any:
    return _first_value(text, _from_python, _from_json)


def _json_value(text: str) -> Any:
    return _first_value(text, _from_json, _from_python)


def _first_value(text: str, *readings: Callable[[str], Any]) -> Any:
    """What a text means, or the text itself."""
    text = text.strip()
    for reading in readings:
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return reading(text)
    return text


def _members(text: str) -> dict[str, Any]:
    """Arguments that came as one value: an object, the text of one, or nothing."""
    value = _json_value(text)
    value = _json_value(value) if isinstance(value, str) else value
    if not isinstance(value, dict | None):
        raise NoCall
    return value or {}


def _from_json(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def _from_python(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes
        return _literal(ast.parse(text, mode="eval").body)


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() as text):
            return text.encode("utf-16", "surrogatepass").decode("utf-16")  # \ud83d\ude00 is one character
        case ast.Constant(value=bool() | int() | None as value):
            return value
        case ast.Constant(value=float() as value):
            return _finite(repr(value))
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            return -_literal(node.operand)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
    raise ValueError("no value")


def _key(node: ast.expr | None) -> str:
    match node:
        case ast.Constant(value=str() as name):
            return name
        case ast.Constant(value=value):
            return json.dumps(value)
    raise ValueError("no name")
