"""Read a JSON object that somebody else wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maverick_jax.errors import UserError

LARGEST = 4 << 20  # bytes; the largest that we know of, of a quantized checkpoint, has a few hundred thousand


def read_object(file: Path) -> dict[str, Any]:
    """The contents of a small file that holds a JSON object.

    Raises:
      UserError: it cannot be read, is far too large, or holds something else.
    """
    try:
        if (size := file.stat().st_size) > LARGEST:
            raise UserError(f"{file} has {size:,} bytes; such a file has at most {LARGEST:,}: fetch it again.")
        values = json.loads(file.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): fetch it again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no JSON object: fetch it again.")
    return values
