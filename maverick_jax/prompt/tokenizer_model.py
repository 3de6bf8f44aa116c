"""Meta's `tokenizer.model` (lines of base64 bytes and rank) as the contents of a `tokenizer.json`.

A rank file names no merges. A byte-level BPE that merges by rank joins two tokens exactly when their concatenation is a
token, so all such pairs, ordered by the rank of what they make, are the merges (spec section 4.2: no difference from
tiktoken over 3,093 texts).
Source of the special tokens: Llama 4 reference, `models/llama4/tokenizer.py`.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from maverick_jax import stand_ins
from maverick_jax.errors import UserError
from maverick_jax.prompt.byte_level import byte_alphabet, byte_level_bpe

SPECIAL_TOKENS = 2048


def read_tokenizer_model(file: Path) -> dict[str, Any]:
    """The contents of an equivalent `tokenizer.json`.

    Raises:
      UserError: a download that went wrong.
      ValueError: a line is not base64 and rank, or ranks are not 0, 1, 2, …
    """
    tokens, content = [], file.read_bytes()
    if (instead := stand_ins.explain(content[: stand_ins.ENOUGH])) is not None:
        raise UserError(f"{file} {instead}")
    for number, line in enumerate(content.splitlines()):
        try:
            token, rank = line.split()
            tokens.append(base64.b64decode(token, validate=True))
        except ValueError as error:
            raise ValueError(f"line {number + 1} is not 'base64 rank'") from error
        if int(rank) != number:
            raise ValueError(f"line {number + 1} has rank {int(rank)} instead of {number}")
    if len(tokens) < 256:
        raise ValueError(f"it has {len(tokens)} tokens, fewer than there are bytes")
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    letters = byte_alphabet()
    written = ["".join(letters[byte] for byte in token) for token in tokens]
    return byte_level_bpe(
        vocabulary={text: rank for rank, text in enumerate(written)},
        merges=[(written[left], written[right]) for left, right in _merges(tokens, rank_of)],
        special=special_tokens(),
    )


def _merges(tokens: list[bytes], rank_of: dict[bytes, int]) -> list[tuple[int, int]]:
    """Pairs of ranks, ordered by the rank of what they make."""
    merges: list[tuple[int, int]] = []
    for token in tokens:
        halves = ((rank_of.get(token[:cut]), rank_of.get(token[cut:])) for cut in range(1, len(token)))
        merges += sorted((left, right) for left, right in halves if left is not None and right is not None)
    return merges


def special_tokens() -> list[str]:
    """The 2,048 special tokens of the releases in the order of their ids, 200000 to 202047 (spec section 4.1)."""

    def reserved(kind: str, first: int, last: int) -> list[str]:
        return [f"<|{kind}_{i}|>" for i in range(first, last + 1)]

    text, vision = "text_post_train_reserved_special_token", "vision_reserved_special_token"
    names = [f"<|{name}|>" for name in "begin_of_text end_of_text fim_prefix fim_middle fim_suffix".split()]
    names += [f"<|{name}|>" for name in "header_start header_end eom eot step".split()] + reserved(text, 0, 5)
    names += ["<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>", *reserved(text, 8, 68)]
    names += ["<|image_start|>", "<|image_end|>", *reserved(vision, 0, 1), "<|tile_x_separator|>", "<|tile_y_separator|>"]
    names += [*reserved(vision, 2, 5), "<|image|>", *reserved(vision, 6, 6), "<|patch|>", *reserved(vision, 7, 1047)]
    names += [*reserved("reasoning_reserved_special_token", 0, 7), "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"]
    return names + reserved("reserved_special_token", 0, SPECIAL_TOKENS - len(names) - 1)
