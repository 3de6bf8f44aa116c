"""A file of conversations as what is learned from it, with what there was to say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.prompt import Tokenizer, load_template
from maverick_jax.training.data.conversations import Conversation, Skipped, read_conversations
from maverick_jax.training.data.examples import Example, Reading, check_long, fit

Item = TypeVar("Item")


def reading_of(model: Path, config: Config) -> Reading:
    """How the model in a directory reads conversations."""
    return Reading(config, Tokenizer.from_directory(model), load_template(model))


def read_items(
    file: Path,
    of_conversation: Callable[[Conversation], Item],
    *,
    shape: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    skip_bad: bool = False,
    progress: bool = False,
) -> tuple[list[Item], list[str]]:
    """What every conversation of a file becomes, and what was passed over, in words.

    Args:
      of_conversation: raises a UserError for what is of no use.
      shape: as of `read_conversations`.
      skip_bad: pass over what is no conversation, or of no use.
    """
    skipped = Skipped()
    items = []
    lines = read_conversations(file, skipped=skipped if skip_bad else None, shape=shape)
    for conversation in tqdm(lines, desc="reading", unit="line", disable=None if progress else True):
        try:
            items.append(of_conversation(conversation))
        except UserError as error:
            reason = f"{file}, line {conversation.line}: {error}"
            if not skip_bad:
                raise UserError(f"{reason} (--skip-bad passes over such lines)") from error
            skipped.add(reason)
    return items, [f"{skipped.count:,} lines were passed over, such as: {skipped.reasons[0]}"] if skipped.count else []


def read_examples(
    file: Path, reading: Reading, *, length: int, long: str = "drop", skip_bad: bool = False, progress: bool = False
) -> tuple[list[Example], list[str]]:
    """Every conversation of a file that can be learned.

    Args:
      length: tokens of an example at most.
      long: what becomes of longer ones, of `LONG`.
      skip_bad: pass over what is no conversation.

    Returns:
      The examples, and what was passed over or cut, in words.

    Raises:
      UserError: a line that is no conversation, unless they are skipped; nothing to learn.
    """
    check_long(long)
    whole, told = read_items(file, reading.example, skip_bad=skip_bad, progress=progress)
    fitting = [fit(example, length, long, reading.config.image_token_index) for example in whole]
    examples = [example for example in fitting if example is not None]
    cut = sum(found is not None and len(found.ids) < len(example.ids) for found, example in zip(fitting, whole, strict=True))
    told += too_long({"dropped": len(whole) - len(examples), "cut": cut}, length)
    if not examples:
        raise UserError(f"{file} has nothing to learn: {' '.join(told) or 'it is empty.'}")
    return examples, told


def too_long(counts: Mapping[str, int], length: int) -> Iterator[str]:
    """What became of longer ones, in words."""
    for what, count in counts.items():
        if count:
            yield f"{count:,} examples have more than {length:,} tokens and were {what}."
