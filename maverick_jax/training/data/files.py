"""A file of conversations as examples, with what there was to say of it."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from maverick_jax.config import Config
from maverick_jax.config.checks import one_of
from maverick_jax.errors import UserError
from maverick_jax.prompt import Tokenizer, load_template
from maverick_jax.training.data.conversations import Skipped, read_conversations
from maverick_jax.training.data.examples import LONG, Example, Reading, fit


def read_examples(
    file: Path, model: Path, config: Config, *, length: int, long: str = "drop", skip_bad: bool = False, progress: bool = False
) -> tuple[list[Example], Reading, list[str]]:
    """Every conversation of a file that can be learned.

    Args:
      model: directory of the tokenizer and chat template.
      length: tokens of an example at most.
      long: what becomes of longer ones, of `LONG`.
      skip_bad: pass over what is no conversation.

    Returns:
      The examples, how they were read, and what was passed over or cut, in words.

    Raises:
      UserError: a line that is no conversation, unless they are skipped; nothing to learn.
    """
    if not (rule := one_of(*LONG)).holds(long):
        raise UserError(f"long is {long!r:.40}: it must be {rule.words}.")
    reading = Reading(config, Tokenizer.from_directory(model), load_template(model))
    skipped = Skipped()
    examples, dropped, cut = [], 0, 0
    for conversation in tqdm(
        read_conversations(file, skipped=skipped if skip_bad else None), desc="reading", unit="line", disable=None if progress else True
    ):
        try:
            whole = reading.example(conversation)
        except UserError as error:
            reason = f"{file}, line {conversation.line}: {error}"
            if not skip_bad:
                raise UserError(f"{reason} (--skip-bad passes over such lines)") from error
            skipped.add(reason)
            continue
        example = fit(whole, length, long, config.image_token_index)
        dropped += example is None
        cut += example is not None and len(example.ids) < len(whole.ids)
        if example is not None:
            examples.append(example)
    told = [f"{skipped.count:,} lines were passed over, such as: {skipped.reasons[0]}"] if skipped.count else []
    told += [
        f"{count:,} examples have more than {length:,} tokens and were {what}."
        for count, what in ((dropped, "dropped"), (cut, "cut"))
        if count
    ]
    if not examples:
        raise UserError(f"{file} has nothing to learn: {' '.join(told) or 'it is empty.'}")
    return examples, reading, told
