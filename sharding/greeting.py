"""How two processes show each other that they belong to one run, before either believes a word of the other.

    caller   {"hello": PROTOCOL, "nonce": c}
    door     {"nonce": s, "proof": of "door", c, s}
    caller   {"process": p, "count": n, "proof": of "caller", c, s, p, n}
    door     {"welcome": true}, or {"end": why not}

A proof is a keyed digest (HMAC) under the run's token, which itself never travels: who listens, or answers in process 0's
place, learns nothing that lets him in. A run without a token greets in the same way and proves nothing.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.sharding.cluster import MOST_PROCESSES
from maverick_jax.sharding.connection import GREETING_BYTES, Connection, Garbled

PROTOCOL = "maverick-jax 2"
GREETING_S = 10.0  # for all of it, however slowly the bytes come


class Stranger(Exception):
    """The other end greets as one of ours would, and does not know the run's token."""


def new_nonce() -> str:
    return secrets.token_hex(16)


def hear(connection: Connection, deadline: float) -> str:
    """At the door: the nonce of a caller who speaks our protocol.

    Raises:
      Gone, Garbled: no process of ours.
    """
    hello = connection.receive(limit=GREETING_BYTES, deadline=deadline)
    if hello.get("hello") != PROTOCOL:
        raise Garbled("no greeting of this version")
    return _nonce_of(hello)


def ask(connection: Connection, token: str, nonce: str, deadline: float) -> tuple[int, int]:
    """At the door: the number of a caller who began with `nonce`, and how many processes it was told of.

    Raises:
      Gone, Garbled: no process of ours. Stranger: one of another run.
    """
    own = new_nonce()
    connection.send(nonce=own, proof=_proof(token, "door", nonce, own))
    answer = connection.receive(limit=GREETING_BYTES, deadline=deadline)
    process, count = answer.get("process"), answer.get("count")
    if type(process) is not int or type(count) is not int or not 0 <= process < count <= MOST_PROCESSES:  # True is an int too
        raise Garbled("no number of a process")
    if not _equal(_proof(token, "caller", nonce, own, process, count), answer.get("proof")):
        raise Stranger
    return process, count


def introduce(connection: Connection, token: str, process: int, count: int, deadline: float) -> None:
    """As the caller: make sure that this is the door of the run, then say who this is, and wait to be let in.

    Raises:
      Gone, Garbled: no door of ours, or one that hears too many at once. Stranger: that of another run.
      UserError: why the run has no place for this process.
    """
    own = new_nonce()
    connection.send(hello=PROTOCOL, nonce=own)
    answer = connection.receive(limit=GREETING_BYTES, deadline=deadline)
    nonce = _nonce_of(answer)
    if not _equal(_proof(token, "door", own, nonce), answer.get("proof")):
        raise Stranger
    connection.send(process=process, count=count, proof=_proof(token, "caller", own, nonce, process, count))
    match connection.receive(limit=GREETING_BYTES, deadline=deadline):
        case {"welcome": True}:
            return
        case {"end": str(reason)}:
            raise UserError(reason)
    raise Garbled("no verdict")


def _nonce_of(message: dict[str, Any]) -> str:
    nonce = message.get("nonce")
    if not isinstance(nonce, str) or not re.fullmatch("[0-9a-f]{32}", nonce):
        raise Garbled("no nonce")
    return nonce


def _proof(token: str, *parts: str | int) -> str:
    return hmac.new(token.encode(errors="surrogateescape"), json.dumps([PROTOCOL, *parts]).encode(), "sha256").hexdigest()


def _equal(expected: str, given: object) -> bool:
    """In constant time: how long it takes tells nothing about a right proof."""
    return isinstance(given, str) and hmac.compare_digest(expected.encode(), given.encode(errors="backslashreplace"))
