"""JSON that others wrote: bounded before it is parsed, for a value of three bytes can take a hundred bytes of memory."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maverick_jax import stand_ins
from maverick_jax.errors import UserError

MAX_BYTES = 16 << 20  # four times the largest of Maverick's, which is the manifest of its FP8 checkpoint
MAX_VALUES = 1_000_000


def read_json(
    file: Path,
    *,
    advice: str = "fetch it again",
    max_bytes: int = MAX_BYTES,
    max_values: int = MAX_VALUES,
) -> dict[str, Any]:
    """A file that holds one JSON object.

    Args:
      advice: what to do about one that does not.
      max_bytes, max_values: what is refused unparsed.

    Raises:
      UserError: no regular file, unreadable, too large, or anything but an object.
    """
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{file} is not a file: {advice}.")
        if found.st_size > max_bytes:
            raise UserError(f"{file} has {found.st_size:,} bytes, more than the {max_bytes:,} that such a file may have: {advice}.")
        with open(file, "rb") as stream:
            text = stream.read(found.st_size)  # no more, though it may grow meanwhile
    except OSError as error:
        cure = "give yourself the right to" if isinstance(error, PermissionError) else advice
        raise UserError(f"{file} cannot be read ({os.strerror(error.errno or 0)}): {cure}.") from error
    if (instead := stand_ins.explain(text[: stand_ins.ENOUGH])) is not None:
        raise UserError(f"{file} {instead}")
    try:
        values = parse_json(text, max_values=max_values)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): {advice}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no JSON object: {advice}.")
    return values


def parse_json(text: bytes, *, max_values: int = MAX_VALUES, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a UTF-8 text, whose length the caller has bounded.

    Args:
      pairs: makes an object of its names and values; None makes a dict.

    Raises:
      ValueError: not JSON, or of more than about `max_values` values.
      RecursionError: nested too deep.
    """
    if (values := sum(map(text.count, (b",", b"[", b"{")))) > max_values:  # every value but the first comes behind one of them
        raise ValueError(f"about {values:,} values, more than the {max_values:,} that there may be")
    return json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
