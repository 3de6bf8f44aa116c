"""Files of conversations, a JSON object per line, and what is wrong with a line that is none.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], "tools": [...]}

Messages as OpenAI's and Hugging Face's chats have them. Pictures are parts of a content: {"type": "image", "image": FILE},
{"type": "image_url", "image_url": {"url": FILE or data:image/png;base64,...}}, or {"type": "image"} for the next of the line's "images".
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from maverick_jax.config.checks import show
from maverick_jax.errors import UserError
from maverick_jax.json_file import parse_json

MAX_LINE = 256 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One line of a file.

    Attributes:
      line: its number, from 1.
      messages: as `prompt.render` takes them, pictures as files or their bytes.
      tools: schemas, or None.
      fields: what else the line has.
    """

    line: int
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    fields: dict[str, Any]


@dataclasses.dataclass
class Skipped:
    """Lines that were passed over: how many, and the first few reasons."""

    count: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)

    def add(self, reason: str, most: int = 5) -> None:
        self.count += 1
        if len(self.reasons) < most:
            self.reasons.append(reason)


def read_conversations(
    file: Path, *, skipped: Skipped | None = None, shape: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Iterator[Conversation]:
    """Every conversation of a file.

    Args:
      skipped: takes what is wrong with a line, which is passed over; None: the first such line is an error.
      shape: gives the object of a line, which may be written otherwise, its messages; refuses what a line lacks beyond them.

    Raises:
      UserError: there is no such file, or a line is no conversation; names the line.
    """
    for number, text in _lines(file):
        try:
            yield _conversation(number, text, file.parent, shape)
        except UserError as error:
            reason = f"{file}, line {number}: {error}"
            if skipped is None:
                raise UserError(reason) from error
            skipped.add(reason)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with file.open("rb") as stream:
            for number, text in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), 1):
                if text.strip():
                    yield number, text
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error


def _conversation(number: int, text: bytes, folder: Path, shape: Callable[[dict[str, Any]], dict[str, Any]] | None) -> Conversation:
    if len(text) > MAX_LINE:
        raise UserError(f"it has more than {MAX_LINE:,} bytes.")
    try:
        fields = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is no JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise UserError('it is no JSON object: give {"messages": [...]}.')
    if shape is not None:
        fields = shape(fields)
    pictures = iter(fields.get("images") or [])
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f'it is no conversation, messages is {show(messages)}: give {{"messages": [{{"role": ..., "content": ...}}, ...]}}.'
        )
    read = [_message(message, pictures, folder) for message in messages]
    if left := sum(1 for _ in pictures):
        raise UserError(f'{left} of its images have no place in a message: give {{"type": "image"}} where they stand.')
    tools = fields.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"tools is {show(tools)}: give a list of schemas.")
    return Conversation(
        number, read, tools or None, {name: value for name, value in fields.items() if name not in ("messages", "images", "tools")}
    )


def _message(message: Any, pictures: Iterator[Any], folder: Path) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"message {show(message)} needs a role.")
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_part(part, pictures, folder) for part in content]}


def _part(part: Any, pictures: Iterator[Any], folder: Path) -> Any:
    if not isinstance(part, dict) or part.get("type") not in ("image", "image_url"):
        return part
    address = part.get("image_url")
    found = address.get("url") if isinstance(address, dict) else address
    found = found or next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None) or next(pictures, None)
    return {"type": "image", "image": _picture(found, folder)}


def _picture(found: Any, folder: Path) -> Any:
    """A file, beside the file of conversations unless it says otherwise, or the bytes of a picture."""
    if isinstance(found, dict):  # as Hugging Face's datasets write a picture
        found = found.get("bytes") or found.get("path")
    if not isinstance(found, str) or not found:
        raise UserError(f"a picture is {show(found)}: give a file, or data:image/png;base64,...")
    head, comma, data = found.partition(",")
    if head.startswith("data:") and comma:
        try:
            return base64.b64decode(data, validate=True)
        except (ValueError, binascii.Error) as error:
            raise UserError(f"a picture is no base64 ({error}).") from error
    return folder / found if "://" not in found else found
