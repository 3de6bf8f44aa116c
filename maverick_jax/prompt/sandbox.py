"""The place where a chat template runs: what transformers gives a template, nothing that reaches Python's inside, and a budget.

Source of what is added to Jinja: transformers, `utils/chat_template_utils.py` (behaviour, no code).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import filters
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_environment, pass_eval_context

from maverick_jax.prompt.budget import CHARACTERS, CONTAINERS, MAX_BITS, TooExpensive, spend, weigh, weight
from maverick_jax.prompt.provenance import Text, as_text, formatted, joined, shown, written
from maverick_jax.prompt.template_compiler import Generation, Generator

SEQUENCES = (list, tuple)
WITHOUT = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")  # filters for web pages; what they cost nobody bounds
SHALLOW = frozenset(  # filters that do not look into what the items hold
    "attr batch count d default first items last length list map reject rejectattr reverse select selectattr slice".split()
)
SORTING = frozenset("dictsort groupby max min sort unique".split())
SIZED = frozenset("batch center indent round slice tojson truncate".split())  # filters that are asked for columns, digits or rows
MAX_SIZE = 10_000
COMPARING = frozenset("eq equalto == ne != lt lessthan < le <= gt greaterthan > ge >= in".split())  # tests
STRINGS_LACK = frozenset(["encode", "maketrans", "own", "translate"])  # ways around `Text`
NUMBERS_HAVE = frozenset(["imag", "is_integer", "real"])


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with authors and a budget."""

    code_generator_class = Generator
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    concat = staticmethod(joined)
    shown = staticmethod(shown)
    spend = staticmethod(spend)
    weigh = staticmethod(weigh)
    written = staticmethod(written)

    def __init__(self):
        loops = "jinja2.ext.loopcontrols"
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, loops])
        del self.globals["lipsum"]
        self.globals |= {"dict": _Dict(), "namespace": _Names, "raise_exception": _raise, "strftime_now": _now}
        self.filters |= {"indent": _indent, "join": _join, "safe": shown, "string": shown, "sum": _sum, "tojson": _to_json}
        self.filters = {name: self._paid(name, run) for name, run in self.filters.items() if name not in WITHOUT}
        self.tests |= {name: _weighing(self.tests[name]) for name in COMPARING}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if (isinstance(obj, str) and attr in STRINGS_LACK) or (isinstance(obj, (int, float)) and attr not in NUMBERS_HAVE):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self._received(super().getattr(_known(obj), attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, slice):
            part = _known(obj)[argument]
            spend(len(part))
            return part
        return self._received(super().getitem(_known(obj), weigh(argument)))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        spend(1)
        if not isinstance(obj, Macro):  # a macro pays for what it does
            weigh(args)
            weigh([value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")])
            searched = getattr(obj, "__self__", None)
            if isinstance(searched, (str, *SEQUENCES)):
                weigh(searched)
        return self._made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        spend(1)
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}
            if bits.get(operator, 0) > MAX_BITS:
                raise TooExpensive(f"a number of {bits[operator]:,} bits: at most {MAX_BITS:,} are allowed")
        elif operator == "*":
            times, repeated = sorted((left, right), key=lambda side: isinstance(side, SEQUENCES))
            if isinstance(repeated, SEQUENCES) and isinstance(times, int):
                spend(len(repeated) * max(times, 0))
        return self._made(super().call_binop(context, operator, _known(left), _known(right)))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        format = super().wrap_str_format(value)
        if format is None or not isinstance(pattern := value.__self__, Text):
            return format
        return lambda *args, **kwargs: formatted(pattern, "{", lambda args, named: format(*args, **named), args, kwargs)

    def _paid(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays for the data it walks through."""
        first = 1 if hasattr(run, "jinja_pass_arg") else 0

        @functools.wraps(run)
        def paid(*args: Any, **kwargs: Any) -> Any:
            spend(1)
            data = [_each(value) if isinstance(value, LoopContext) and name not in SHALLOW else _known(value) for value in args[first:]]
            for value in (*data, *kwargs.values()):
                if name not in SHALLOW:
                    weigh(value)
                    if name in SORTING and isinstance(value, CONTAINERS):
                        spend(16 * len(value))
                elif isinstance(value, CONTAINERS):
                    spend(len(value))
            for value in (*data[1:], *kwargs.values()):
                if name in SIZED and isinstance(value, int) and abs(value) > MAX_SIZE:
                    raise TooExpensive(f"the filter {name} is asked for {value:,}: at most {MAX_SIZE:,} are allowed")
            return self._made(run(*args[:first], *data, **kwargs))

        return paid

    def _received(self, value: Any) -> Any:
        return _known(value)

    def _made(self, value: Any) -> Any:
        """The result of an operation, paid for."""
        if isinstance(value, CONTAINERS):
            spend(len(value))
        elif isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return _each(value)
        return _known(value)


def _known(value: Any) -> Any:
    return as_text(value) if isinstance(value, str) else value


def _each(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        spend(1)
        yield item


def _weighing(test: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(test)
    def weighing(*args: Any) -> Any:
        return test(*map(weigh, args))

    return weighing


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Names(Namespace):
    """A namespace without names that Python itself would look up."""

    def __init__(*args: Any, **kwargs: Any):
        Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no {name!r}: names must not begin with an underscore")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    spend(sum(map(int, re.findall(r"\d+", form))) // CHARACTERS)
    return datetime.now().strftime(form)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Text:
    pad = as_text(width) if isinstance(width, str) else written(" " * width)
    lines = (shown(text) + written("\n")).splitlines()
    rest = [pad + line if line or blank else line for line in lines[1:]]
    return written("\n").join([pad + lines[0] if first else lines[0], *rest])


@pass_eval_context
def _join(eval_ctx: Any, value: Iterable[Any], d: str = written(""), attribute: Any = None) -> str:
    return filters.FILTERS["join"](eval_ctx, value, d, attribute)


@pass_environment
def _sum(environment: Any, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    items = list(iterable)
    if isinstance(start, CONTAINERS):  # every addition copies what came before
        weigh(items)
        spend(len(items) * weight(items) // CHARACTERS)
    return filters.FILTERS["sum"](environment, items, attribute, start)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> Text:
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces = []
    for piece in encoder.iterencode(value):
        spend(len(piece) // CHARACTERS)
        pieces.append(piece)
    return Text("".join(pieces))
