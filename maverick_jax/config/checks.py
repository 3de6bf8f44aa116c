"""What the fields of a configuration may hold: a rule per field, the same for every file and for Python.

The readers check a file before they derive anything from it, the dataclasses check themselves. The upper limits are far
beyond any model: a number beyond them is a mistake or worse, and nothing of its size must be built before that is known.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from maverick_jax.errors import UserError

MOST = (1 << 31) - 1  # positions and token ids are int32
SHOWN = 60  # characters of a value in a message


class Rule(NamedTuple):
    """`words` completes "it must be ..."."""

    words: str
    holds: Callable[[Any], bool]


def is_whole(value: Any) -> bool:
    """Whether it is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(low: int, high: int) -> Rule:
    return Rule(f"a whole number from {low:,} to {high:,}", lambda value: is_whole(value) and low <= value <= high)


def number(words: str, holds: Callable[[float], bool]) -> Rule:
    """An int or a float; no comparison holds for NaN, and what float32 cannot hold is none."""
    return Rule(words, lambda value: (is_whole(value) or isinstance(value, float)) and abs(value) < 3e38 and holds(value))


def one_of(*values: str) -> Rule:
    return Rule(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def list_of(rule: Rule) -> Rule:
    return Rule(f"a list, each entry {rule.words}", lambda value: isinstance(value, list) and all(map(rule.holds, value)))


def instance_of(kind: type) -> Rule:
    return Rule(f"a {kind.__name__}", lambda value: isinstance(value, kind))


def or_none(rule: Rule) -> Rule:
    return Rule(f"{rule.words}, or None", lambda value: value is None or rule.holds(value))


def check(values: Mapping[str, Any], rules: Mapping[str, Rule], prefix: str = "") -> None:
    """Refuse the first value that breaks its field's rule; fields that are not there break none.

    Args:
      prefix: of the names in the message, such as "text_config.".

    Raises:
      UserError: names the field, its value, and what it must be.
    """
    for name, rule in rules.items():
        if name in values and not rule.holds(values[name]):
            raise UserError(f"{prefix}{name} is {show(values[name])}: it must be {rule.words}.")


def without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something: null is as good as absent."""
    return {name: value for name, value in values.items() if value is not None}


def require(values: Mapping[str, Any], names: Iterable[str], prefix: str = "") -> None:
    """Refuse a file that lacks fields without which there is no model."""
    if missing := [name for name in names if name not in values]:
        raise UserError(f"{', '.join(prefix + name for name in missing)} missing: this does not describe a Llama 4 model.")


def square(name: str, value: Any) -> Any:
    """The side of a square, of a tile or a patch, that a file may give as a number, as both sides or as `{"height": ..., "width": ...}`."""
    sides = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if not sides or any(side != sides[0] for side in sides):
        raise UserError(f"{name} is {show(value)}: tiles and patches are squares.")
    return sides[0]


def path_of(name: str, value: Any) -> Path:
    """A path that a caller gives, `~` being the home directory.

    Raises:
      UserError: neither a text nor a `Path`, or a text that names nothing.
    """
    if not isinstance(value, str | os.PathLike) or not str(value).strip() or "\0" in str(value):
        raise UserError(f"{name} is {show(value)}: it must be a path.")
    return Path(os.path.expanduser(value))


def spell(name: str) -> str:
    """A field's name in a message: as it is, unless it would not stay in its place."""
    return name if name.isidentifier() else show(name)


def show(value: Any) -> str:
    """A value in a message: on one line, and cut short."""
    try:
        text = repr(value)
    except ValueError:  # Python spells no int of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 20]}…"


POSITIVE = number("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = number("a number, 0 or more", lambda value: value >= 0)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
SWITCH = Rule("true or false, or a whole number, of which 0 is false", lambda value: isinstance(value, int))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
WIDTH = whole(1, 1 << 24)
LAYERS = whole(1, 1024)
LAYER = whole(0, 1023)
HEADS = whole(1, 1 << 16)
EXPERTS = whole(0, 1 << 16)
TOKENS = whole(1, MOST)
TOKENS_AS_FLOAT = Rule(TOKENS.words, lambda value: TOKENS.holds(int(value) if isinstance(value, float) and value.is_integer() else value))
STEP = whole(0, MOST)
TOKEN_ID = whole(0, MOST)
NO_OR_TOKEN_ID = whole(-1, MOST)  # some tools write -1 for a token that there is not
STOP_IDS = Rule(
    "a token id or a list of token ids",
    lambda value: all(map(TOKEN_ID.holds, value)) if isinstance(value, list) else TOKEN_ID.holds(value),
)
EVEN = Rule("an even whole number from 2 to 65,536", lambda value: HEADS.holds(value) and value % 2 == 0)  # RoPE turns pairs
SHUFFLE = number("1 divided by a whole number, such as 0.5", lambda value: 1e-3 < value <= 1 and abs(1 / value - round(1 / value)) < 1e-6)
DTYPE = one_of("bfloat16", "float16", "float32")
LAYER_TYPE = one_of("full_attention", "chunked_attention")
LAYER_NUMBERS = Rule(
    "a tuple of layer numbers in rising order",
    lambda value: isinstance(value, tuple) and all(map(LAYER.holds, value)) and list(value) == sorted(set(value)),
)

ROPE_SCALING = {
    "factor": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "original_max_position_embeddings": TOKENS,
}
TEXT = {
    "vocab_size": WIDTH,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "intermediate_size_mlp": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": EVEN,
    "num_local_experts": EXPERTS,
    "moe_layers": LAYER_NUMBERS,
    "nope_layers": LAYER_NUMBERS,
    "attention_chunk_size": or_none(TOKENS),
    "use_qk_norm": FLAG,
    "tie_word_embeddings": FLAG,
    "rope_theta": POSITIVE,
    "attn_temperature_tuning": FLAG,
    "floor_scale": TOKENS,
    "attn_scale": NOT_NEGATIVE,
    "rms_norm_eps": POSITIVE,
    "max_position_embeddings": TOKENS,
}
VISION = {
    "image_size": WIDTH,
    "patch_size": WIDTH,
    "num_channels": WIDTH,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "projector_input_dim": WIDTH,
    "projector_output_dim": WIDTH,
    "vision_output_dim": WIDTH,
    "pixel_shuffle_ratio": SHUFFLE,
    "rope_theta": POSITIVE,
    "max_tiles": whole(1, 1 << 16),
}
MODEL = {
    "image_token_index": TOKEN_ID,
    "bos_token_id": NO_OR_TOKEN_ID,
    "pad_token_id": NO_OR_TOKEN_ID,
    "eos_token_id": Rule("a tuple of token ids", lambda value: isinstance(value, tuple) and all(map(TOKEN_ID.holds, value))),
    "dtype": DTYPE,
}
