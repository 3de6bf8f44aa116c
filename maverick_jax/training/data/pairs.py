"""Pairs of answers to one conversation, of which one was preferred.

    {"messages": [{"role": "user", "content": "2 + 2?"}], "chosen": "4", "rejected": "5"}

An answer is a text, a message, or a list of messages; "prompt" is another name for "messages" and may be a text. Without either, chosen and
rejected are whole conversations that begin alike, as Hugging Face's preference datasets have them.

Shape suffixes: A micro-batches, B rows: pair p has rows 2p, chosen, and 2p + 1, rejected.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maverick_jax.config.checks import show
from maverick_jax.errors import UserError
from maverick_jax.training.data.conversations import Conversation
from maverick_jax.training.data.examples import Example, Reading, check_long, fit
from maverick_jax.training.data.files import read_items, too_long
from maverick_jax.training.data.packing import batch_of
from maverick_jax.training.data.rows import stacked, tiles_of
from maverick_jax.training.preference import Pairs


class Pair(NamedTuple):
    """Two answers, each with the conversation before it; only the answers are learned."""

    chosen: Example
    rejected: Example


def of_preference(fields: dict[str, Any]) -> dict[str, Any]:
    """The object of a line with messages, of whatever spelling.

    Raises:
      UserError: an answer is missing or is none.
    """
    found = {}
    for name in ("chosen", "rejected"):
        answer = fields.get(name)
        if isinstance(answer, str):
            answer = {"role": "assistant", "content": answer}
        answer = [answer] if isinstance(answer, dict) else answer
        if not isinstance(answer, list) or not answer or not all(isinstance(message, dict) for message in answer):
            raise UserError(f"its {name} is {show(fields.get(name))}: give a text, a message or a list of messages.")
        found[name] = answer
    before = fields.get("messages", fields.get("prompt"))
    if isinstance(before, str):
        before = [{"role": "user", "content": before}]
    if before is None:
        alike = itertools.takewhile(lambda both: both[0] == both[1], zip(found["chosen"], found["rejected"], strict=False))
        before = [message for message, _ in alike]
        found = {name: answer[len(before) :] for name, answer in found.items()}
    if not all(found.values()):
        raise UserError("its chosen and rejected answers are the same.")
    return {**fields, **found, "messages": before}


def pair_of(conversation: Conversation, reading: Reading) -> Pair:
    """Raises:
    UserError: an answer that cannot be read, or two that are the same.
    """
    before = [{**message, "weight": 0} for message in conversation.messages]
    answers = [conversation.fields[name] for name in ("chosen", "rejected")]
    chosen, rejected = (reading.example(dataclasses.replace(conversation, messages=[*before, *answer])) for answer in answers)
    if np.array_equal(chosen.ids, rejected.ids):
        raise UserError("its chosen and rejected answers are the same.")
    return Pair(chosen, rejected)


def read_pairs(
    file: Path, reading: Reading, *, length: int, long: str = "drop", skip_bad: bool = False, progress: bool = False
) -> tuple[list[Pair], list[str]]:
    """Every pair of a file, and what was passed over or cut, in words; arguments and errors as of `read_examples`."""
    check_long(long)
    whole, told = read_items(file, lambda line: pair_of(line, reading), shape=of_preference, skip_bad=skip_bad, progress=progress)
    pairs, cut = [], 0
    for pair in whole:
        chosen, rejected = (fit(answer, length, long, reading.config.image_token_index) for answer in pair)
        if chosen is not None and rejected is not None:
            pairs.append(Pair(chosen, rejected))
            cut += max(map(len, (pair.chosen.ids, pair.rejected.ids))) > length
    told += too_long({"dropped": len(whole) - len(pairs), "cut": cut}, length)
    if not pairs:
        raise UserError(f"{file} has nothing to learn: {' '.join(told) or 'it is empty.'}")
    return pairs, told


class PairRows:
    """Pairs as rows of `length` tokens, one answer each.

    Args:
      reference_P2: of each pair, what the model before training says of its answers (`preference.score`); None: not yet known.
    """

    def __init__(self, pairs: Sequence[Pair], reading: Reading, length: int, reference_P2: np.ndarray | None = None):
        self.pairs, self.reading, self.length, self.reference_P2 = pairs, reading, length, reference_P2
        self.pictures = any(pair.chosen.tiles for pair in pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __call__(self, rows_AB: np.ndarray) -> Pairs:
        found = [[[answer] for pair in rows_B for answer in self.pairs[pair]] for rows_B in rows_AB]
        batch = stacked([batch_of(rows, self.length, packed=False) for rows in found])
        if self.pictures:
            batch = batch._replace(tiles_N3SS=tiles_of(found, self.reading))
        reference = np.zeros((*rows_AB.shape, 2), np.float32) if self.reference_P2 is None else self.reference_P2[rows_AB]
        return Pairs(batch, reference.reshape(len(rows_AB), -1))
