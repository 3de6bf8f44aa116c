"""What an answer is worth: plain functions of its text and of the line of the file that asked for it.

    def reward(text: str, line: dict) -> float: ...

`line` is the object of the file; `line["answer"]` is the right answer, if there is one.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maverick_jax.config.checks import show
from maverick_jax.errors import UserError, first_line

Reward = Callable[[str, Mapping[str, Any]], float]


class BadReward(UserError):
    """A reward that raised, or is no number."""


def exact(text: str, line: Mapping[str, Any]) -> float:
    """1 for the right answer, letter by letter but for white space around it."""
    return float(text.strip() == _answer(line).strip())


def number(text: str, line: Mapping[str, Any]) -> float:
    """1 if the last number of the text is the last number of the right answer."""
    found, right = (re.findall(r"-?\d+(?:\.\d+)?", words.replace(",", "")) for words in (text, _answer(line)))
    if not right:
        raise UserError(f"its answer has no number: {show(line['answer'])}.")
    return float(bool(found) and float(found[-1]) == float(right[-1]))


def json_value(text: str, line: Mapping[str, Any]) -> float:
    """1 for JSON, which must say the same as the right answer where that is JSON too."""
    try:
        found = json.loads(text)
        right = json.loads(line["answer"]) if isinstance(line.get("answer"), str) else line.get("answer")
    except ValueError:
        return 0.0
    return float(right is None or found == right)


def form(pattern: str) -> Reward:
    """1 for a text that fits a regular expression as a whole."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression ({error}).") from error
    return lambda text, line: float(compiled.fullmatch(text.strip()) is not None)


NAMED: dict[str, Reward] = {"exact": exact, "number": number, "json": json_value}


def parse(words: Sequence[str]) -> Reward:
    """The sum of some rewards: `exact`, `0.2*format:REGEX`, `3*FILE.py:FUNCTION`.

    Raises:
      UserError: there is no such reward, or its file cannot be read.
    """
    parts = []
    for word in words:
        weight, rest = re.fullmatch(r"(?:([0-9.]+)\*)?(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr] - it matches any text
        try:
            parts.append((1.0 if weight is None else float(weight), _one(rest)))
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"{weight!r} of the reward {word!r} is no number.") from error
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    return lambda text, line: sum(weight * reward(text, line) for weight, reward in parts)


def worth(reward: Reward, text: str, line: Mapping[str, Any]) -> float:
    """Raises:
    BadReward: it raised, or gave no finite number; says which line's.
    """
    try:
        found = float(reward(text, line))
    except Exception as error:
        raise BadReward(f"the reward of {show(text)} raised {type(error).__name__}: {first_line(error)}") from error
    if not math.isfinite(found):
        raise BadReward(f"the reward of {show(text)} is {found}: give a finite number.")
    return found


def _one(word: str) -> Reward:
    if word in NAMED:
        return NAMED[word]
    kind, colon, rest = word.partition(":")
    if colon and kind == "format":
        return form(rest)
    file, colon, function = word.rpartition(":")
    if colon and file.endswith(".py"):
        return _of_file(Path(file), function)
    raise UserError(
        f"there is no reward {word!r}: give {', '.join(NAMED)}, format:REGEX or FILE.py:FUNCTION, with a weight as in 0.5*exact."
    )


def _of_file(file: Path, function: str) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    try:
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file} cannot be read as rewards ({type(error).__name__}: {first_line(error)}).") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{file} has no function {function!r}.")
    return found


def _answer(line: Mapping[str, Any]) -> str:
    answer = line.get("answer")
    if not isinstance(answer, str):
        raise UserError(f"the line has no answer to compare with: answer is {show(answer)}.")
    return answer
