"""A conversation as token ids and tiles, through a checkpoint's own chat template or in the format of the releases.

Source: Llama 4 reference, `models/llama4/chat_format.py`; spec section 3.7.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.prompt.images import as_tiles
from maverick_jax.prompt.llama4_format import CONTROL, write_dialog
from maverick_jax.prompt.provenance import Text
from maverick_jax.prompt.template import ChatTemplate
from maverick_jax.prompt.tokenizer import Tokenizer
from maverick_jax.prompt.tools import tool_schema

MAX_IMAGES = 48
IMAGE = "<|image|>"
MEDIA = frozenset("audio file image image_url input_audio video".split())  # kinds of parts that hold no text
TOOL_ROLES = ("tool", "ipython", "function")  # whose content may be any data

Message = Mapping[str, Any]
Tool = Mapping[str, Any] | Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model takes.

    Attributes:
      token_ids: with `tokens_per_tile` `<|patch|>` tokens for every tile.
      tiles: [N, 3, S, S] float32 of all pictures in order, or None.
    """

    token_ids: list[int]
    tiles: np.ndarray | None = None

    def __repr__(self) -> str:
        pictures = "" if self.tiles is None else f", tiles {list(self.tiles.shape)}"
        return f"Prompt({len(self.token_ids):,} tokens{pictures})"


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    config: Config,
    *,
    template: ChatTemplate | None = None,
    tools: Sequence[Tool] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool | str = False,
) -> Prompt:
    """The prompt that asks the assistant to go on.

    Args:
      messages: `{"role": ..., "content": ...}` and whatever else the template reads (`tool_calls`, `name`,
        `reasoning_content`, ...); content is a string or a list of `{"type": "text", "text": ...}` and
        `{"type": "image", "image": what load_picture takes or tile_image returned}`, of a tool any data.
      template: the checkpoint's own, from `load_template`; None is the format of the releases.
      tools: JSON schemas of functions, or Python functions with types and a docstring in Google's style.
      add_generation_prompt: end with the header of the assistant's message.
      continue_final_message: end within the last message instead, which the model then continues: in its content, or in
        the named field.

    Raises:
      UserError: a message that cannot be understood, a picture that cannot be read, or too many pictures.
    """
    pieces, images = compose(
        messages,
        tokenizer,
        template=template,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )
    ids = [id for piece in pieces for id in tokenizer.encode_authored(piece, piece.own)]
    if not images:
        return Prompt(ids)
    blocks, tiles = cut_pictures(ids, images, tokenizer, config)
    marker, block = tokenizer.id_of(IMAGE), iter(blocks)
    return Prompt([token for id in ids for token in (next(block) if id == marker else [id])], np.concatenate(tiles))


def compose(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    template: ChatTemplate | None = None,
    tools: Sequence[Tool] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool | str = False,
) -> tuple[list[Text], list[Any]]:
    """What `render` encodes: texts that know who wrote them, each encoded apart from the others, and their pictures, for each of
    which they hold an `<|image|>`. Arguments and errors as for `render`."""
    messages = _listed(messages, "a conversation is a list of at least one message")
    if not messages:
        raise UserError("a conversation is a list of at least one message, not empty.")
    for message in messages:
        _check(message, any_parts=template is not None)
    schemas = tool_schemas(tools)
    images = [_picture(part) for message in messages for part in _parts(message) if part.get("type") == "image"]
    if len(images) > MAX_IMAGES:
        raise UserError(f"the prompt has {len(images)} pictures: at most {MAX_IMAGES} fit in one prompt.")
    options: dict[str, Any] = {"tools": schemas, "add_generation_prompt": add_generation_prompt}
    if template is None:
        for token in CONTROL:
            tokenizer.id_of(token)  # one that it lacks would be written as plain text
        return write_dialog(messages, **options, continue_final_message=bool(continue_final_message)), images
    field = "content" if continue_final_message is True else continue_final_message or None
    return [template.render(messages, **options, continued=field)], images


def user_message(text: str, images: Sequence[Any] = ()) -> dict[str, Any]:
    """A question about pictures, which stand in front of it."""
    pictures = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}] if pictures else text}


def tool_schemas(tools: Sequence[Tool] | None) -> list[Mapping[str, Any]] | None:
    """The schema of every tool.

    Raises:
      UserError: no list, or what `tool_schema` refuses.
    """
    return None if tools is None else [tool_schema(tool) for tool in _listed(tools, "tools are a list of schemas and functions")]


def _listed(values: Any, expected: str) -> list[Any]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise UserError(f"{expected}, not {_short(values)}.")
    return list(values)


def cut_pictures(
    ids: Sequence[int], images: Sequence[Any], tokenizer: Tokenizer, config: Config
) -> tuple[list[list[int]], list[np.ndarray]]:
    """Of every picture the tokens that take the place of its `<|image|>` among `ids`, and its tiles [n, 3, S, S].

    Raises:
      UserError: no vision tower, a picture that cannot be read, or another number of places than of pictures.
    """
    if config.vision is None:
        raise UserError("this checkpoint has no vision tower: it takes text only.")
    if (places := list(ids).count(tokenizer.id_of(IMAGE))) != len(images):
        raise UserError(f"the chat template placed {places} of {len(images)} pictures: put them into user messages.")
    cut = [as_tiles(image, config.vision) for image in images]
    blocks = [image_tokens(rows, columns, config.vision.tokens_per_tile, tokenizer) for _, (rows, columns) in cut]
    return blocks, [tiles for tiles, _ in cut]


def image_tokens(rows: int, columns: int, tokens_per_tile: int, tokenizer: Tokenizer) -> list[int]:
    """The tokens of one picture: tiles row by row with separators, then the whole picture, which `<|image|>` announces."""
    start, end, x, y, image, patch = (
        tokenizer.id_of(f"<|{name}|>") for name in ("image_start", "image_end", "tile_x_separator", "tile_y_separator", "image", "patch")
    )
    tile = [patch] * tokens_per_tile
    row = [*[*tile, x] * (columns - 1), *tile, y]
    return [start, *(row * rows if rows * columns > 1 else []), image, *tile, end]


def _check(message: Any, *, any_parts: bool) -> None:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(f"message {_short(message)} needs a role: give {{'role': 'user', 'content': ...}}.")
    content = message.get("content")
    if message["role"] in TOOL_ROLES or content is None or isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)):
        raise UserError(f"message {_short(message)} has a content of type {type(content).__name__}: give a text or a list of parts.")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        known = (kind == "image" and _picture(part) is not None) or (kind == "text" and isinstance(part.get("text"), str))
        if not known and not (any_parts and isinstance(kind, str) and isinstance(part.get(kind), str) and kind not in MEDIA):
            raise UserError(
                f"message part {_short(part)} is neither {{'type': 'text', 'text': ...}} nor {{'type': 'image', 'image': ...}}."
            )


def _parts(message: Message) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, (list, tuple)) else []


def _picture(part: Mapping[str, Any]) -> Any:
    return next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
