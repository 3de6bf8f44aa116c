"""A prompt token by token: what each is written with, and whether template, conversation or picture brought it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from maverick_jax.config import Config
from maverick_jax.prompt.chat import IMAGE, cut_pictures
from maverick_jax.prompt.provenance import GIVEN, OWN, Text, own_of
from maverick_jax.prompt.tokenizer import Tokenizer

TEMPLATE, TEXT = "template", "text"


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a prompt.

    Attributes:
      spelling: UTF-8 bytes that it is written with, perhaps part of a character.
      special: it controls the model; text that is spelled alike is not.
      source: `template`, `text` (somebody's words), `template + text` of one that joins both, or `picture 1` and so on.
    """

    id: int
    spelling: bytes
    special: bool
    source: str


def list_tokens(pieces: Sequence[Text], images: Sequence[Any], tokenizer: Tokenizer, config: Config) -> list[Token]:
    """The tokens that `render` makes of what `compose` returned.

    Raises:
      UserError: as `cut_pictures`.
    """
    tokens = [token for piece in pieces for token in _of_piece(piece, tokenizer)]
    if not images:
        return tokens
    blocks, _ = cut_pictures([token.id for token in tokens], images, tokenizer, config)
    pictures = iter(enumerate(blocks, start=1))
    expanded = []
    for token in tokens:
        if token.id == tokenizer.id_of(IMAGE):
            number, block = next(pictures)
            expanded += [Token(id, tokenizer.spelling(id), True, f"picture {number}") for id in block]
        else:
            expanded.append(token)
    return expanded


def _of_piece(piece: Text, tokenizer: Tokenizer) -> Iterator[Token]:
    """The tokens' bytes are the text's, in order. Where they are not, because a tokenizer changes what it reads, all counts as given."""
    ids = tokenizer.encode_authored(piece, piece.own)
    written = str.encode(piece)
    own = b"".join(bytes([mark]) * len(char.encode()) for char, mark in zip(str.__str__(piece), own_of(piece), strict=True))
    special = set(tokenizer.special.values())
    at = 0
    for id in ids:
        spelling = tokenizer.spelling(id)
        authors = set(own[at : at + len(spelling)]) if written.startswith(spelling, at) else set()
        at += len(spelling)
        source = " + ".join(name for mark, name in ((OWN[0], TEMPLATE), (GIVEN[0], TEXT)) if mark in authors) or TEXT
        yield Token(id, spelling, id in special, source)
