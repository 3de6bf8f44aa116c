"""What rendering a chat template may cost: one number of steps for time and memory together.

A template is a program from the internet. Every block of statements pays for the nodes in it each time it runs, every text
for its length when it comes into being, and every operation for the data it walks through, before it does.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

STEPS = 500_000  # a template of the releases takes some hundred for each message
STEPS_PER_WEIGHT = 2000  # more, for every piece of the conversation: many templates walk through all of it for each message
CHARACTERS = 16  # cost one step
OUTPUT = 200_000  # characters that a template may write
OUTPUT_PER_WEIGHT = 10 * CHARACTERS  # more, for every piece of the conversation
MAX_BITS = 20_000  # of a whole number


CONTAINERS = (list, tuple, dict, range, KeysView, ValuesView, ItemsView)


class TooExpensive(Exception):
    """A template asked for more than its budget."""


class _Budget:
    def __init__(self, weight: int):
        self.left = STEPS + STEPS_PER_WEIGHT * weight
        self.output = OUTPUT + OUTPUT_PER_WEIGHT * weight


_budget: contextvars.ContextVar[_Budget | None] = contextvars.ContextVar("budget", default=None)


@contextlib.contextmanager
def budget_for(*inputs: Any) -> Iterator[None]:
    """Within this, work on texts and data is paid from a budget that grows with `inputs`."""
    token = _budget.set(_Budget(sum(map(weight, inputs))))
    try:
        yield
    finally:
        _budget.reset(token)


def spend(steps: int) -> None:
    """Pay.

    Raises:
      TooExpensive: the budget does not hold so much.
    """
    budget = _budget.get()
    if budget is not None:
        budget.left -= steps
        if budget.left < 0:
            raise TooExpensive("it takes more time or memory than a chat template needs: is it meant to do harm?")


def check_output(characters: int) -> None:
    """Bound what is handed to the tokenizer, which needs some hundred times as much memory.

    Raises:
      TooExpensive: so long a text is no prompt.
    """
    budget = _budget.get()
    if budget is not None and characters > budget.output:
        raise TooExpensive(f"it writes more than the {budget.output:,} characters that are allowed for this conversation")


def weigh(value: Any) -> Any:
    """`value`, paid for as something that is walked through to its last leaf."""
    if isinstance(value, str):
        spend(len(value) // CHARACTERS)
    elif isinstance(value, CONTAINERS):
        budget = _budget.get()
        spend(weight(value, limit=budget.left if budget else None))
    return value


def weight(value: Any, *, limit: int | None = None) -> int:
    """Leaves and branches of `value`, counted as often as they are met; beyond `limit` it stops counting.

    Counted as met: thirty lists, each holding the one before twice, are written as a billion.
    """
    total, waiting = 0, [value]
    while waiting and (limit is None or total <= limit):
        item = waiting.pop()
        total += 1
        if isinstance(item, str):
            total += len(item) // CHARACTERS
        elif isinstance(item, dict):
            total += len(item)
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, CONTAINERS):
            total += len(item)
            waiting += () if isinstance(item, range) else item
    return total
