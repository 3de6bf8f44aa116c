"""Conversations as tokens, and which of them are learned: what the assistant says, and the token that ends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from maverick_jax.config import Config
from maverick_jax.config.checks import one_of
from maverick_jax.errors import UserError
from maverick_jax.prompt import ChatTemplate, Tokenizer, as_tiles, render
from maverick_jax.training.data.conversations import Conversation

LONG = ("drop", "cut-start", "cut-end")


class Example(NamedTuple):
    """One conversation.

    Attributes:
      ids: int32.
      learned: bool, the tokens whose prediction counts.
      pictures: as `prompt.as_tiles` takes them, in their order.
      tiles: how many they are cut into.
    """

    ids: np.ndarray
    learned: np.ndarray
    pictures: tuple[Any, ...] = ()
    tiles: int = 0


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a model reads conversations."""

    config: Config
    tokenizer: Tokenizer
    template: ChatTemplate | None

    def example(self, conversation: Conversation) -> Example:
        """Raises:
        UserError: a message or picture that cannot be read, or no word of the assistant's to learn.
        """
        messages, tools = conversation.messages, conversation.tools
        whole = self._ids(messages, tools)
        ids = np.array(whole.token_ids, np.int32)
        learned = np.zeros(len(ids), bool)
        for at, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("weight") == 0:  # OpenAI's field
                continue
            before = self._ids(messages[:at], tools, add_generation_prompt=True).token_ids if at else []
            until = self._ids(messages[: at + 1], tools).token_ids
            if whole.token_ids[: len(before)] != before or whole.token_ids[: len(until)] != until or not before:
                raise UserError(
                    f"its message {at + 1} cannot be told from what comes before: the chat template writes earlier messages otherwise once "
                    "there are later ones, or the assistant begins."
                )
            learned[len(before) : len(until)] = True
        if not learned.any():
            raise UserError("no message of the assistant is in it: there is nothing to learn.")
        return Example(ids, learned, _pictures(messages), 0 if whole.tiles is None else len(whole.tiles))

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Any) -> Example:
        """What an assistant's answer would follow; nothing of it is learned."""
        asked = self._ids(messages, tools, add_generation_prompt=True)
        ids = np.array(asked.token_ids, np.int32)
        return Example(ids, np.zeros(len(ids), bool), _pictures(messages), 0 if asked.tiles is None else len(asked.tiles))

    def tiles(self, pictures: Sequence[Any]) -> list[np.ndarray]:
        """[n, 3, S, S] of each."""
        assert self.config.vision is not None
        return [as_tiles(picture, self.config.vision)[0] for picture in pictures]

    def _ids(self, messages: Sequence[dict[str, Any]], tools: Any, *, add_generation_prompt: bool = False) -> Any:
        return render(
            messages, self.tokenizer, self.config, template=self.template, tools=tools, add_generation_prompt=add_generation_prompt
        )


def _pictures(messages: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    return tuple(part["image"] for m in messages if isinstance(m.get("content"), list) for part in m["content"] if "image" in part)


def check_long(long: str) -> None:
    """Refuse what is not of `LONG`."""
    if not (rule := one_of(*LONG)).holds(long):
        raise UserError(f"long is {long!r:.40}: it must be {rule.words}.")


def fit(example: Example, length: int, long: str, patch: int) -> Example | None:
    """An example of at most `length` tokens, or None for one that is dropped.

    Args:
      long: of `LONG`: where one that is longer is cut, if at all. One whose pictures would be cut is dropped.
      patch: the token that stands for image features.
    """
    if len(example.ids) <= length:
        return example
    keep = slice(len(example.ids) - length, None) if long == "cut-start" else slice(length)
    cut = np.ones(len(example.ids), bool)
    cut[keep] = False
    if long == "drop" or (example.ids[cut] == patch).any() or not example.learned[keep][1:].any():
        return None
    return example._replace(ids=example.ids[keep], learned=example.learned[keep])
