"""Pictures in what clients send: their bytes as base64 in an address, or the address of a picture that is elsewhere."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import shown


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a picture is, to be fetched if this is allowed."""

    url: str


def picture_at(url: Any) -> bytes | Address:
    """A picture's bytes, of an address that holds them.

    Raises:
      UserError: no address of a picture.
    """
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if head.startswith("data:image/") and head.endswith(";base64") and comma:
        return decoded(data)
    if isinstance(url, str) and url.partition(":")[0].lower() in ("http", "https"):
        return Address(url)
    raise UserError(f"a picture's address is {shown(url)}: give data:image/png;base64,… with its bytes.")


def decoded(data: Any) -> bytes:
    """The bytes of a picture.

    Raises:
      UserError: no base64.
    """
    try:
        return base64.b64decode(data, validate=True)
    except (ValueError, TypeError) as error:
        raise UserError(f"a picture is no base64 ({error}): encode it again.") from error


def refuse_address(address: Address) -> bytes:
    raise UserError(f"a picture's address is {shown(address.url)}: nothing is fetched here; give data:image/png;base64,… with its bytes.")
