"""Text that knows, character by character, who wrote it: the chat template, or the conversation it was given.

A control token counts only where the template wrote all of it. The template sees every text exactly as it is and may cut,
strip, join and replace as it likes: the pieces keep their authors. What no rule here follows counts as given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

from jinja2 import Undefined

from maverick_jax.prompt.budget import CHARACTERS, spend, weigh, weight

GIVEN, OWN = b"\x00", b"\x01"


class Text(str):
    """A string with its authors.

    Attributes:
      own: a byte for every character: 1 where the template wrote it, 0 where it was given.
    """

    __slots__ = ("own",)
    own: bytes

    def __new__(cls, text: str = "", own: bytes | None = None) -> Text:
        spend(1 + len(text) // CHARACTERS)
        self = super().__new__(cls, text)
        self.own = GIVEN * len(text) if own is None else own
        assert len(self.own) == len(text)
        return self

    def __str__(self) -> str:
        return self  # str(text) keeps the authors

    def __add__(self, other: str) -> Text:
        return Text(str.__add__(self, other), self.own + own_of(other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> Text:
        return Text(str.__add__(other, self), own_of(other) + self.own) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> Text:
        spend(len(self) * max(times.__index__(), 0) // CHARACTERS)
        return Text(str.__mul__(self, times), self.own * times.__index__())

    __rmul__ = __mul__  # pyright: ignore[reportAssignmentType]

    def __getitem__(self, key: SupportsIndex | slice) -> Text:
        return Text(str.__getitem__(self, key), self.own[key] if isinstance(key, slice) else bytes([self.own[key]]))

    def __iter__(self) -> Iterator[Text]:
        return (self[i] for i in range(len(self)))

    def __mod__(self, values: Any) -> Text:
        args, named = ((), values) if isinstance(values, dict) else (values if isinstance(values, tuple) else (values,), {})
        return formatted(self, "%", lambda args, named: str.__mod__(self, named or args), args, named)

    def lstrip(self, chars: str | None = None) -> Text:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> Text:
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None) -> Text:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> Text:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> Text:
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        spend(len(self) // 2 if sep is None else self.count(sep))
        return self._located(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        spend(len(self) // 2 if sep is None else self.count(sep))
        return self._located(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        spend(len(self) // 2)
        lines = self._located(str.splitlines(self, True), "")
        return lines if keepends else [line[: len(bare)] for line, bare in zip(lines, str.splitlines(self), strict=True)]

    def partition(self, sep: str) -> tuple[str, str, str]:
        before, found, after = self._located(str.partition(self, sep), "")
        return before, found, after

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        before, found, after = self._located(str.rpartition(self, sep), "")
        return before, found, after

    def _located(self, parts: Sequence[str], between: str | None) -> list[str]:
        """`parts` of this text in their order, `between` every two of them (None: any white space)."""
        located, at = [], 0
        for part in parts:
            at = self.find(part, at) if between is None else at
            located.append(self[at : at + len(part)])
            at += len(part) + len(between or "")
        return located

    def join(self, items: Iterable[str]) -> Text:
        texts = list(items)
        spend((sum(map(len, texts)) + len(self) * len(texts)) // CHARACTERS)
        return Text(str.join(self, texts), self.own.join(map(own_of, texts)))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Text:
        if old == "":  # between all characters: nobody's way to write a control token
            spend((len(self) + 1) * len(new) // CHARACTERS)
            return Text(str.replace(self, old, new, count))
        return as_text(new).join(self.split(old, count))

    def expandtabs(self, tabsize: SupportsIndex = 8) -> Text:
        spend(self.count("\t") * max(tabsize.__index__(), 0) // CHARACTERS)
        return _whole(str.expandtabs(self, tabsize), self)


def _letter_by_letter(change: Callable[[str], str]) -> Callable[[Text], Text]:
    def changed(self: Text) -> Text:
        result = change(self)
        return Text(result, self.own) if len(result) == len(self) else _whole(result, self)

    return changed


def _padded(pad: Callable[..., str]) -> Callable[..., Text]:
    def padded(self: Text, width: SupportsIndex, *fill: str) -> Text:
        spend(max(width.__index__(), 0) // CHARACTERS)
        return _whole(pad(self, width, *fill), self, *fill)

    return padded


for _change in (str.upper, str.lower, str.title, str.capitalize, str.swapcase, str.casefold):
    setattr(Text, _change.__name__, _letter_by_letter(_change))
for _pad in (str.center, str.ljust, str.rjust, str.zfill):
    setattr(Text, _pad.__name__, _padded(_pad))


def written(text: str) -> Text:
    """Text by the template."""
    return Text(text, OWN * len(text))


def as_text(text: str) -> Text:
    return text if isinstance(text, Text) else Text(text)


def own_of(text: str) -> bytes:
    return text.own if isinstance(text, Text) else GIVEN * len(text)


def shown(value: Any) -> Text:
    """`value` as a template prints it. Numbers count as the template's: they hold no words."""
    if isinstance(value, Text):
        return value
    text = str(weigh(value))
    return written(text) if value is None or isinstance(value, (int, float, Undefined)) else as_text(text)


def joined(pieces: Iterable[Any]) -> Text:
    return written("").join(map(shown, pieces))


def _whole(result: str, *sources: str) -> Text:
    """A text whose characters cannot be followed: the template's if all that it was made of is."""
    return written(result) if all(GIVEN not in own_of(source) for source in sources) else Text(result)


_FLAGS = r"%(?:\([^)%]*\))?[#0\- +\d.*]*[hlL]?"
_COUNTED = {"%": re.compile(r"%[^a-zA-Z%]*\*"), "{": re.compile(r"\{[^{}]*\{")}  # a width that is itself a value
_AS_CODE = {"%": re.compile(rf"{_FLAGS}[ra]"), "{": re.compile(r"\{[^{}]*![ra]")}  # repr() of a text has another length

Apply = Callable[[tuple[Any, ...], dict[str, Any]], str]


def formatted(pattern: Text, marker: str, apply: Apply, args: tuple[Any, ...], named: dict[str, Any]) -> Text:
    """`apply(args, named)`, which fills the fields of `pattern`, with its authors.

    It is filled once more with every given character replaced: what stays the same is the template's.
    """
    values = (*args, *named.values())
    weigh(values)
    width = sum(map(int, re.findall(r"\d+", pattern))) + CHARACTERS * sum(map(weight, values))
    if _COUNTED[marker].search(pattern):
        width += sum(abs(value) for value in values if isinstance(value, int))
    spend(pattern.count(marker) * width // CHARACTERS)
    result = apply(args, named)
    simple = all(value is None or isinstance(value, (str, int, float, Undefined)) for value in values)
    if GIVEN in pattern.own or _AS_CODE[marker].search(pattern) or not simple:
        return Text(result)
    twin = apply(tuple(map(_without_given, args)), {name: _without_given(value) for name, value in named.items()})
    if len(twin) != len(result):
        return Text(result)
    return Text(result, bytes(ours == theirs != "\0" for ours, theirs in zip(result, twin, strict=True)))


def _without_given(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return "".join(char if own else "\0" for char, own in zip(str.__str__(value), own_of(value), strict=True))
