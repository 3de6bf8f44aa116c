"""Text to token ids and back, from Hugging Face's `tokenizer.json` or Meta's `tokenizer.model`.

Special tokens control the model. They are recognised only where the caller says so: what a user types is plain text, so
that nobody can end a turn or open a system message by typing `<|eot|>`. Added tokens that are not special, such as
`<think>`, are vocabulary: one id in every text.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

import tokenizers

from maverick_jax.errors import UserError
from maverick_jax.json_file import read_json
from maverick_jax.prompt.byte_level import byte_alphabet
from maverick_jax.prompt.tokenizer_model import read_tokenizer_model

FILES = ("tokenizer.json", "tokenizer.model")
MAX_BYTES, MAX_VALUES = 256 << 20, 8_000_000  # of a tokenizer.json; Llama 4's has 28 MB and 1.6 million values


class Tokenizer:
    """Byte-level BPE with special tokens.

    Args:
      description: the contents of a `tokenizer.json`.

    Attributes:
      special: special token -> id.
    """

    def __init__(self, description: dict[str, Any]):
        added = description.get("added_tokens") or []
        self.special: dict[str, int] = {token["content"]: token["id"] for token in added if token.get("special", True)}
        self._control = {id: token for token, id in self.special.items()}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(description | {"post_processor": None}))  # adds nothing in front
        self._plain.encode_special_tokens = True  # as the text that they are spelled with
        self._vocabulary_text = {token["id"]: token["content"] for token in added if token["id"] not in self._control}
        self._pattern = re.compile("|".join(re.escape(s) for s in sorted(self.special, key=len, reverse=True)) or r"(?!)")
        self._byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json`, or else `tokenizer.model`, of a checkpoint directory.

        Raises:
          UserError: neither file is there, or it cannot be read.
        """
        file = next((Path(path) / name for name in FILES if (Path(path) / name).is_file()), None)
        if file is None:
            raise UserError(f"{path} has no {' or '.join(FILES)}: copy one from the checkpoint's repository.")
        try:
            return cls(
                read_json(file, max_bytes=MAX_BYTES, max_values=MAX_VALUES) if file.suffix == ".json" else read_tokenizer_model(file)
            )
        except UserError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{file} is no tokenizer that can be read ({error}): fetch it again.") from error

    def __repr__(self) -> str:
        return f"Tokenizer({self._plain.get_vocab_size():,} tokens, {len(self.special):,} of them special)"

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`, nothing added in front. `allow_special` recognises special tokens: only for trusted text."""
        return self.encode_authored(text, b"\x01" * len(text)) if allow_special else self._encode_plain(text)

    def encode_authored(self, text: str, trusted: bytes) -> list[int]:
        """Token ids of `text`, in which only those special tokens count of which every character is trusted.

        Args:
          trusted: a byte for every character, 1 or 0.
        """
        text, ids, end = str.__str__(text), [], 0
        for run in re.finditer(rb"\x01+", trusted):
            for match in self._pattern.finditer(text, *run.span()):
                ids += [*self._encode_plain(text[end : match.start()]), self.special[match.group()]]
                end = match.end()
        return ids + self._encode_plain(text[end:])

    def _encode_plain(self, text: str) -> list[int]:
        """Token ids of text without special tokens, even if the vocabulary has one that ordinary splitting would find."""
        try:
            found = self._plain.encode(text, add_special_tokens=False)
        except TypeError as error:
            at = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
            if at is None:
                raise
            raise UserError(f"a text holds half a character at {at} ({text[at]!a}): it was cut apart or decoded wrongly.") from error
        if self._control.keys().isdisjoint(found.ids):
            return found.ids
        if len(text) == 1:
            return [id for id in found.ids if id not in self._control]
        at = next(start for id, (start, _) in zip(found.ids, found.offsets, strict=True) if id in self._control) or 1
        return self._encode_plain(text[:at]) + self._encode_plain(text[at:])

    def id_of(self, token: str) -> int:
        """Id of a special token.

        Raises:
          UserError: the tokenizer lacks it.
        """
        if token not in self.special:
            raise UserError(f"the tokenizer has no {token}: it does not belong to a Llama 4 checkpoint.")
        return self.special[token]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens."""
        decoder = StreamDecoder(self)
        return "".join(decoder.push(id) for id in ids) + decoder.flush()

    def bytes_of(self, id: int) -> bytes:
        """UTF-8 bytes that a token stands for: none for a special token or an unknown id, perhaps part of a character."""
        if id in self._control:
            return b""
        if id in self._vocabulary_text:
            return self._vocabulary_text[id].encode()
        return bytes(self._byte_of[char] for char in self._plain.id_to_token(id) or "")

    def spelling(self, id: int) -> bytes:
        """UTF-8 bytes that a token is written with: a special one's name, of another what it stands for."""
        return self._control[id].encode() if id in self._control else self.bytes_of(id)


class StreamDecoder:
    """Tokens to text, one at a time. A character that spans tokens comes whole with its last one."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        return self._utf8.decode(self._tokenizer.bytes_of(id))

    def flush(self) -> str:
        """A replacement character if the last character never became whole."""
        return self._utf8.decode(b"", final=True)
