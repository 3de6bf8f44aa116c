"""API keys: who may ask, and how much at once.

Always: comparing takes as long whatever a key has in common with a right one.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import hmac
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import Range, whole
from maverick_jax.serving.failure import AGAIN_S, Failure

VARIABLE = "MAVERICK_API_KEYS"
LOOK_AGAIN_S = 1.0  # at a file, which may have changed
AT_ONCE = Range(whole, 1, float("inf"), "a whole number, 1 or more")
NOBODY = "-"  # asks where no key is needed


class Keys:
    """The keys that are taken, and how many requests each has running.

    Args:
      file: a key per line, or a name and a key; it is read again when it has changed. None: those of `MAVERICK_API_KEYS`, between commas.
      at_once: requests that a key may have running; None: any number.

    Raises:
      UserError: the file cannot be read, or has no key.
    """

    def __init__(self, file: str | Path | None = None, at_once: int | None = None):
        self._file = None if file is None else Path(file)
        self._at_once = None if at_once is None else AT_ONCE.check("--per-key", at_once)
        self._running: collections.Counter[str] = collections.Counter()
        self._names: dict[bytes, str] = {}
        self._looked, self._stamp = 0.0, (0, 0)
        if self._file is not None:
            self._read(self._file)
        elif words := [word.strip() for word in os.environ.get(VARIABLE, "").split(",") if word.strip()]:
            self._names = _named([[word] for word in words])

    @property
    def needed(self) -> bool:
        return bool(self._names) or self._file is not None

    def owner(self, headers: Mapping[str, str]) -> str:
        """The name of the key that a request has.

        Raises:
          Failure: none, or a wrong one.
        """
        self._look()
        if not self.needed:
            return NOBODY
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not key:
            said = "an API key is missing: send the header Authorization: Bearer KEY."
            raise Failure(401, said, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        given, found = _digest(key), None
        for digest, name in self._names.items():  # all of them, whichever it is
            if hmac.compare_digest(digest, given):
                found = name
        if found is None:
            said = "this API key is not known here: check it, or ask who runs this server."
            raise Failure(401, said, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return found

    @contextlib.contextmanager
    def one_more(self, owner: str) -> Iterator[None]:
        """While a request runs.

        Raises:
          Failure: as many run already as may.
        """
        if self._at_once is not None and self._running[owner] >= self._at_once:
            said = f"{self._at_once} requests of this key are running, as many as may: wait for one to end."
            raise Failure(429, said, code="rate_limit_exceeded", headers={"retry-after": str(AGAIN_S)})
        self._running[owner] += 1
        try:
            yield
        finally:
            self._running[owner] -= 1
            if not self._running[owner]:
                del self._running[owner]

    def _look(self) -> None:
        """Whether the file has changed; one that cannot be read leaves the keys as they are."""
        now = time.monotonic()
        if self._file is not None and now - self._looked > LOOK_AGAIN_S:
            with contextlib.suppress(UserError):
                self._read(self._file)
            self._looked = now

    def _read(self, file: Path) -> None:
        try:
            found = file.stat()
            if (stamp := (found.st_mtime_ns, found.st_size)) == self._stamp:
                return
            lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}): name a file with an API key per line.") from error
        words = [line for line in lines if line and not line[0].startswith("#")]
        if not words or any(len(line) > 2 for line in words):
            raise UserError(f"{file} has no API keys: write one per line, or its owner's name, a blank and the key.")
        self._names, self._stamp = _named(words), stamp


def _named(lines: list[list[str]]) -> dict[bytes, str]:
    """Digests of keys, and their names: the first four characters of the digest where there is none."""
    return {(digest := _digest(words[-1])): words[0] if len(words) == 2 else digest.hex()[:4] for words in lines}


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
