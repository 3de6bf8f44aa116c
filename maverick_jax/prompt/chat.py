"""A conversation as token ids and tiles: Meta's chat format, or a checkpoint's own Jinja template in a sandbox.

Sources: Llama 4 reference, `models/llama4/chat_format.py`; spec sections 3.7 and 4.3.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.prompt.images import tile_image
from maverick_jax.prompt.tokenizer import Tokenizer

MAX_IMAGES = 48
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython", "ipython": "ipython"}

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model takes.

    Attributes:
      token_ids: with `tokens_per_tile` `<|patch|>` tokens for every tile.
      tiles: [N, 3, S, S] float32 of all pictures in order, or None.
    """

    token_ids: list[int]
    tiles: np.ndarray | None = None


def render(messages: Sequence[Message], tokenizer: Tokenizer, config: Config, *, template: jinja2.Template | None = None) -> Prompt:
    """The prompt that asks the assistant to go on.

    Args:
      messages: `{"role": ..., "content": ...}`; content is a string or a list of `{"type": "text", "text": ...}` and
        `{"type": "image", "image": path, bytes or PIL picture}`.
      template: the checkpoint's own, from `load_template`; None is Meta's format.

    Raises:
      UserError: a message that cannot be understood, a picture that cannot be read, or too many pictures.
    """
    messages = [_checked(message) for message in messages]
    images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
    if len(images) > MAX_IMAGES:
        raise UserError(f"the prompt has {len(images)} pictures: at most {MAX_IMAGES} fit in one prompt.")
    ids = _meta_format(messages, tokenizer) if template is None else _from_template(messages, tokenizer, template)
    if not images:
        return Prompt(ids)
    if config.vision is None:
        raise UserError("this checkpoint has no vision tower: it takes text only.")
    marker = tokenizer.id_of("<|image|>")
    if ids.count(marker) != len(images):
        raise UserError(f"the chat template placed {ids.count(marker)} of {len(images)} pictures: put them into user messages.")
    cut = [tile_image(image, config.vision) for image in images]
    blocks = iter(image_tokens(rows, columns, config.vision.tokens_per_tile, tokenizer) for _, (rows, columns) in cut)
    expanded = [token for id in ids for token in (next(blocks) if id == marker else [id])]
    return Prompt(expanded, np.concatenate([tiles for tiles, _ in cut]))


def image_tokens(rows: int, columns: int, tokens_per_tile: int, tokenizer: Tokenizer) -> list[int]:
    """The tokens of one picture: tiles row by row with separators, then the whole picture, which `<|image|>` announces."""
    start, end, x, y, image, patch = (
        tokenizer.id_of(f"<|{name}|>") for name in ("image_start", "image_end", "tile_x_separator", "tile_y_separator", "image", "patch")
    )
    tile = [patch] * tokens_per_tile
    row = [*[*tile, x] * (columns - 1), *tile, y]
    return [start, *(row * rows if rows * columns > 1 else []), image, *tile, end]


def _checked(message: Message) -> Message:
    """The message with its content as a list of parts."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise UserError(f"message {_short(message)} needs a role: one of {', '.join(ROLES)}.")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image") or kind not in part or (kind == "text" and not isinstance(part["text"], str)):
            raise UserError(
                f"message part {_short(part)} is neither {{'type': 'text', 'text': ...}} nor {{'type': 'image', 'image': ...}}."
            )
    return message | {"content": list(parts)}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _meta_format(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    begin, open_header, close_header, end_of_message, end_of_turn = (
        tokenizer.id_of(f"<|{name}|>") for name in ("begin_of_text", "header_start", "header_end", "eom", "eot")
    )

    def header(role: str) -> list[int]:
        return [open_header, *tokenizer.encode(role), close_header, *tokenizer.encode("\n\n")]

    ids = [begin]
    for message in messages:
        if message.get("tool_calls"):
            raise UserError("tool calls in a message need the checkpoint's own chat template: none was found beside its tokenizer.")
        role = ROLES[message["role"]]
        ids += header(role)
        for part in message["content"]:
            ids += [tokenizer.id_of("<|image|>")] if part["type"] == "image" else tokenizer.encode(part["text"])
        ids.append(end_of_message if role == "ipython" else end_of_turn)
    return ids + header("assistant")


def load_template(path: str | Path) -> jinja2.Template | None:
    """The chat template that a checkpoint directory brings, or None.

    Raises:
      UserError: a file that cannot be read, or a template with a syntax error.
    """
    directory = Path(path)
    source = None
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        file = directory / name
        if source is None and file.is_file():
            try:
                text = file.read_text(encoding="utf-8")
                source = text if file.suffix == ".jinja" else json.loads(text).get("chat_template")
            except (ValueError, AttributeError) as error:
                raise UserError(f"{file} cannot be read ({error}): fetch it again or remove it.") from error
    if isinstance(source, list):  # several named templates
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template of {directory} has an error in line {error.lineno}: {error.message}.") from error


def _from_template(messages: list[Message], tokenizer: Tokenizer, template: jinja2.Template) -> list[int]:
    """Special tokens are those that the template wrote. A user's are broken up by a character that nothing else contains."""
    given = [message | {"content": _for_template(message["content"])} for message in messages]
    used = set(_all_text(given))
    breaker = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in used)
    first = re.compile("[" + re.escape("".join({token[0] for token in tokenizer.special})) + "]")
    safe = _map_text(given, lambda text: first.sub(lambda match: match.group() + breaker, text))
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"}
    try:
        text = template.render(messages=safe, add_generation_prompt=True, **special)
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(f"the chat template refused the conversation: {error}") from error
    return [id for segment in tokenizer.split(text) for id in _encode(segment, breaker, tokenizer)]


def _encode(segment: str | int, breaker: str, tokenizer: Tokenizer) -> list[int]:
    return [segment] if isinstance(segment, int) else tokenizer.encode(segment.replace(breaker, ""))


def _for_template(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Text alone as a string, which every template understands; pictures as their place only."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return [part if part["type"] == "text" else {"type": "image"} for part in parts]


def _map_text(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: item if key in ("role", "type") else _map_text(item, change) for key, item in value.items()}
    return [_map_text(item, change) for item in value] if isinstance(value, list) else value


def _all_text(value: Any) -> str:
    texts: list[str] = []
    _map_text(value, texts.append)
    return "".join(texts)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
