"""What a caller asks for, checked before anything runs: settings and their ranges, prompts, stop tokens.

Python takes `True` for 1 and NumPy 5.9 for 5; here a whole number is an int of Python, NumPy or JAX, and nothing else.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import operator
import reprlib
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from maverick_jax.config import TextConfig
from maverick_jax.errors import UserError

NO_LISTS = (str, bytes, bytearray, Mapping, Set)  # that Python would iterate all the same


Call = TypeVar("Call", bound=Callable[..., Any])


class NoRoom(UserError):
    """Prompt and answer together are longer than the context."""


def names_the_nearest(call: Call) -> Call:
    """A misspelt keyword is a TypeError that names the one that is like it, as Python itself says it from 3.13 on."""
    known = [name for name, parameter in inspect.signature(call).parameters.items() if parameter.kind is not parameter.POSITIONAL_ONLY]

    @functools.wraps(call)
    def checked(*args: Any, **named: Any) -> Any:
        for name in named.keys() - set(known):
            near = difflib.get_close_matches(name, known, n=1)
            meant = f". Did you mean {near[0]!r}?" if near else f": it takes {', '.join(n for n in known if n != 'self')}."
            raise TypeError(f"{call.__qualname__}() got an unexpected keyword argument {name!r}{meant}")
        return call(*args, **named)

    return cast(Call, checked)


def whole(value: Any) -> int | None:
    """The int that a value is, or None."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def real(value: Any) -> float | None:
    """The float that a number is, or None."""
    scalar = isinstance(value, numbers.Real) or (getattr(value, "ndim", None) == 0 and value.dtype.kind in "fiu")
    if not scalar or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf")


class Range(NamedTuple):
    """What a setting may be.

    Attributes:
      read: `whole` or `real`.
      least, most: both included.
      expected: the same in words.
    """

    read: Callable[[Any], Any]
    least: float
    most: float
    expected: str

    def check(self, name: str, value: Any) -> Any:
        """The value as a Python number.

        Raises:
          UserError: names the setting, and says what it is and what it may be.
        """
        number = self.read(value)
        if number is None or not self.least <= number <= self.most:  # NaN is in no range
            raise UserError(f"{name} is {shown(value)}: it must be {self.expected}.")
        return number


MAX_NEW_TOKENS = Range(whole, 1, float("inf"), "a whole number, 1 or more")


def token_rows(prompts: Any, vocabulary: int) -> list[np.ndarray]:
    """[T] int32 ids of every prompt.

    Args:
      prompts: an iterable of iterables of ids, such as lists or arrays.

    Raises:
      UserError: names the prompt and what is wrong with it.
    """
    rows = listed(prompts)
    if rows is None:
        raise UserError(f"prompts is {shown(prompts)}: expected a list of prompts, each a list of token ids.")
    if rows and whole(rows[0]) is not None:
        raise UserError("prompts is a flat list of token ids: expected a list of prompts, [[1, 2, 3]] for a single one.")
    return [_token_row(row, f"prompt {i}", vocabulary) for i, row in enumerate(rows)]


def _token_row(values: Any, name: str, vocabulary: int) -> np.ndarray:
    items = listed(values)
    if items is None:
        raise UserError(f"{name} is {shown(values)}: expected a list of token ids, which a tokenizer makes of text.")
    if not items:
        raise UserError(f"{name} is empty: give at least one token.")
    ids = whole_numbers(items, name)
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise UserError(f"{name} has token ids outside 0..{vocabulary - 1}: is it from another tokenizer?")
    return np.array(ids, np.int32)


def stop_tokens(stop_ids: Any, vocabulary: int) -> np.ndarray:
    """[S] int32 of a list of ids, or of one."""
    items = [stop_ids] if whole(stop_ids) is not None else listed(stop_ids)
    if items is None:
        raise UserError(f"stop_ids is {shown(stop_ids)}: expected a list of token ids; stop strings belong to Chat.")
    ids = whole_numbers(items, "stop_ids")
    if any(not 0 <= id < vocabulary for id in ids):
        raise UserError(f"stop_ids has token ids outside 0..{vocabulary - 1}: is it from another tokenizer?")
    return np.array(ids, np.int32)


def stop_strings(stop: Any) -> tuple[str, ...]:
    """The texts of a list, or a single text, which is not its letters.

    Raises:
      UserError: anything else, and a text without letters, which would end every answer or none.
    """
    items = [stop] if isinstance(stop, str) else listed(stop)
    if items is None:
        raise UserError(f"stop is {shown(stop)}: expected a text or a list of texts.")
    for item in items:
        if not isinstance(item, str) or not item:
            raise UserError(f"stop holds {shown(item)}: expected texts of at least one character; token ids are stop_ids of generate.")
    return tuple(items)


def check_room(prompts: list[np.ndarray], max_new_tokens: int, config: TextConfig) -> None:
    """Prompt and answer must fit the context together."""
    for i, prompt in enumerate(prompts):
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise NoRoom(
                f"prompt {i} has {len(prompt)} tokens and up to {shown(max_new_tokens)} are asked for, but the context holds "
                f"{config.max_position_embeddings}: shorten the prompt or lower max_new_tokens."
            )


def whole_numbers(items: list, name: str) -> list[int]:
    """The ints that all items are.

    Raises:
      UserError: names the first that is none.
    """
    ids = []
    for item in items:
        if (id := whole(item)) is None:
            raise UserError(f"{name} holds {shown(item)}: expected whole numbers.")
        ids.append(id)
    return ids


def listed(values: Any) -> list | None:
    """The items of a list, a tuple, an array, a range, a generator; None for what has none, and for text."""
    if isinstance(values, NO_LISTS):
        return None
    if hasattr(values, "tolist"):  # of an array whole: one item at a time is slow
        values = values.tolist()
    try:
        return list(values)
    except TypeError:
        return None


def shown(value: Any) -> str:
    """A value in an error message: on one line and short, whatever it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # of a number with thousands of digits Python makes no text
        return "a very large number"
