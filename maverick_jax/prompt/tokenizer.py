"""Text to token ids and back, from Hugging Face's `tokenizer.json` or Meta's `tokenizer.model`.

Special tokens are recognised only where the caller says so: what a user types is plain text, so that nobody can end a
turn or open a system message by typing `<|eot|>`.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

import tokenizers

from maverick_jax.errors import UserError
from maverick_jax.prompt.byte_level import byte_alphabet
from maverick_jax.prompt.tokenizer_model import read_tokenizer_model

FILES = ("tokenizer.json", "tokenizer.model")


class Tokenizer:
    """Byte-level BPE with special tokens.

    Args:
      description: the contents of a `tokenizer.json`.

    Attributes:
      special: special token -> id.
    """

    def __init__(self, description: dict[str, Any]):
        added = description.get("added_tokens") or []
        self.special: dict[str, int] = {token["content"]: token["id"] for token in added}
        self._hidden = {token["id"] for token in added if token.get("special", True)}
        # Without added tokens no text can become one; without post-processor nothing is added in front.
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(description | {"added_tokens": [], "post_processor": None}))
        self._text_of = {id: text for text, id in self.special.items()}
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
            return cls(json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else read_tokenizer_model(file))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{file} is no tokenizer that can be read ({error}): fetch it again.") from error

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`, nothing added in front. `allow_special` recognises special tokens: only for trusted text."""
        return [id for segment in (self.split(text) if allow_special else [text]) for id in self._encode_segment(segment)]

    def split(self, text: str) -> list[str | int]:
        """Trusted text as plain segments and the ids of the special tokens between them."""
        segments: list[str | int] = []
        end = 0
        for match in self._pattern.finditer(text):
            segments += [text[end : match.start()], self.special[match.group()]]
            end = match.end()
        return [segment for segment in [*segments, text[end:]] if segment != ""]

    def _encode_segment(self, segment: str | int) -> list[int]:
        return [segment] if isinstance(segment, int) else self._plain.encode(segment, add_special_tokens=False).ids

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
        if id in self._hidden:
            return b""
        if id in self._text_of:
            return self._text_of[id].encode()
        return bytes(self._byte_of[char] for char in self._plain.id_to_token(id) or "")


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
