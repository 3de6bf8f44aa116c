"""What a model is asked, with what is needed to judge its answers.

    {"messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4", ...}

A conversation that ends with the assistant asks what comes before, and its last message is the right answer.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maverick_jax.errors import UserError
from maverick_jax.training.data.conversations import Conversation
from maverick_jax.training.data.examples import Reading
from maverick_jax.training.data.files import read_items, too_long


class Prompt(NamedTuple):
    """One question.

    Attributes:
      ids: int32.
      line: the object of the file, with its "answer" where it has one.
      name: file and line, for people.
      number: of the line.
      pictures, tiles: as of `Example`.
    """

    ids: np.ndarray
    line: dict[str, Any]
    name: str
    number: int
    pictures: tuple[Any, ...] = ()
    tiles: int = 0


def prompt_of(conversation: Conversation, reading: Reading, file: Path | str) -> Prompt:
    """Raises:
    UserError: a message or picture that cannot be read.
    """
    messages, line = conversation.messages, {"messages": conversation.messages, "tools": conversation.tools, **conversation.fields}
    if messages[-1]["role"] == "assistant":
        line.setdefault("answer", messages[-1].get("content"))
        messages = messages[:-1]
    if not messages:
        raise UserError("nothing is asked in it.")
    example = reading.prompt(messages, conversation.tools)
    name = f"{file}, line {conversation.line}"
    return Prompt(example.ids, line, name, conversation.line, example.pictures, example.tiles)


def read_prompts(
    file: Path, reading: Reading, *, length: int, skip_bad: bool = False, progress: bool = False
) -> tuple[list[Prompt], list[str]]:
    """Every prompt of a file, and what was passed over or dropped, in words.

    Args:
      length: tokens of a prompt at most.

    Raises:
      UserError: a line that is no conversation, unless they are skipped; nothing to ask.
    """
    found, told = read_items(file, lambda line: prompt_of(line, reading, file), skip_bad=skip_bad, progress=progress)
    prompts = [prompt for prompt in found if len(prompt.ids) <= length]
    told += too_long({"dropped": len(found) - len(prompts)}, length)
    if not prompts:
        raise UserError(f"{file} has nothing to ask: {' '.join(told) or 'it is empty.'}")
    return prompts, told


@dataclasses.dataclass
class Pool:
    """Numbers of prompts in an order that a seed decides, every epoch another; some rest for a while.

    Attributes:
      at: how many have been taken or passed over.
      until: number -> step before which it rests.
    """

    count: int
    seed: int
    at: int = 0
    until: dict[int, int] = dataclasses.field(default_factory=dict)

    def take(self, n: int, step: int) -> list[int]:
        """The next n that do not rest in this step; fewer if there are no others."""
        found: list[int] = []
        for _ in range(2 * self.count):  # the orders of two epochs, wherever it is in the first
            if len(found) == n:
                break
            epoch, place = divmod(self.at, self.count)
            if place == 0 or self._epoch != epoch:
                self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.count)
            number = int(self._order[place])
            self.at += 1
            if self.until.get(number, 0) <= step and number not in found:
                found.append(number)
        return found

    def rest(self, number: int, until: int) -> None:
        self.until[number] = until

    def state(self) -> dict[str, Any]:
        return {"at": self.at, "until": {str(number): step for number, step in self.until.items()}}

    def go_to(self, state: dict[str, Any]) -> None:
        self.at, self.until = state["at"], {int(number): step for number, step in state["until"].items()}

    _epoch: int = -1
    _order: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))
