"""Messages and pictures in, token ids and tiles out. NumPy only: no jax, no torch."""

from maverick_jax.prompt.chat import Prompt, render, tool_schemas, user_message
from maverick_jax.prompt.images import as_tiles, listed_pictures, load_picture, tile_image
from maverick_jax.prompt.template import ChatTemplate, load_template
from maverick_jax.prompt.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "ChatTemplate",
    "Prompt",
    "StreamDecoder",
    "Tokenizer",
    "as_tiles",
    "listed_pictures",
    "load_picture",
    "load_template",
    "render",
    "tile_image",
    "tool_schemas",
    "user_message",
]
