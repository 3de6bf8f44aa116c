"""Can prompts be made with what a checkpoint brings? Its tokenizer is opened and its chat template compiled before a weight is read."""

from __future__ import annotations

from pathlib import Path

from maverick_jax.convert.formats.companions import find_companions
from maverick_jax.prompt.template import load_template
from maverick_jax.prompt.tokenizer import FILES, Tokenizer


def check_prompting(directory: Path) -> list[str]:
    """Look at all that is copied beside the weights; what would first be missed, or fail, when somebody talks to the model.

    Returns:
      A note if something is missing, for there are models that are not talked to.

    Raises:
      UserError: a tokenizer or a chat template that is there and cannot be used; or as `find_companions`.
    """
    find_companions(directory)
    has_tokenizer = any((directory / name).is_file() for name in FILES)
    if has_tokenizer:
        Tokenizer.from_directory(directory)
    has_template = load_template(directory) is not None
    if has_tokenizer and has_template:
        return []
    if has_tokenizer:
        return [f"{directory} has no chat template: chats take the format of the releases; for another, add its chat_template.jinja."]
    also = "" if has_template else ", and no chat template"
    return [f"{directory} has no {' or '.join(FILES)}{also}: copy them from the model's repository before you generate or chat."]
