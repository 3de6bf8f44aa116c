"""A model directory in an object store: its small files are fetched, its weights are read where they are.

The local copy has a file `params` with the address of the weights in the place of the folder `params/`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import tempfile
import urllib.parse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from maverick_jax.convert.formats import hub
from maverick_jax.convert.formats.companions import COMPANIONS, MANIFEST, MAX_COMPANION, PARAMS, TEMPLATES
from maverick_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

STORE = "gs://"
SERVER = "https://storage.googleapis.com"
REACH_S = 5.0  # for a connection to the server
LOGIN = "log in with `gcloud auth application-default login`, or ask for the right to read it."


@functools.cache
def fetch(url: str) -> tempfile.TemporaryDirectory:
    """The local copy of `gs://bucket/model`, kept until the process ends.

    Raises:
      UserError: no access, what it takes is not installed, or there is no finished model directory.
    """
    hub.refuse_page(url)
    if not url.startswith(STORE):
        raise UserError(f"{url}: of object stores only {STORE} is supported.")
    _check_reachable(url)
    local = tempfile.TemporaryDirectory(prefix="maverick-")
    with contextlib.ExitStack() as undo:
        undo.callback(local.cleanup)
        _fetch_into(local.name, url)
        undo.pop_all()
    return local


def _fetch_into(folder: str, url: str) -> None:
    from etils import epath

    try:
        with _quiet():
            _copy(epath.Path(url), epath.Path(folder))
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"reading {url} takes gcsfs: pip install 'maverick-jax[gcs]'.") from error
    except Exception as error:  # the client raises many kinds
        denied = "Forbidden" in str(error) or getattr(error, "code", None) in (401, 403)
        raise UserError(f"{url} cannot be read ({error}){f': {LOGIN}' if denied else '.'}") from error


def _check_reachable(url: str) -> None:
    """Whether the store's server answers at all: its client tries for most of a minute before it says that there is no network."""
    server = urllib.parse.urlsplit(os.environ.get("STORAGE_EMULATOR_HOST") or SERVER)
    host, port = server.hostname or "", server.port or 443
    try:
        socket.create_connection((host, port), timeout=REACH_S).close()
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or error
        raise UserError(
            f"{url} cannot be read, for {host} cannot be reached ({why}): check the network, or give a directory here."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The client logs the traceback of what it raises."""
    log = logging.getLogger("gcsfs")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


def _copy(source: epath.Path, destination: epath.Path) -> None:
    try:
        (source / MANIFEST).stat()
    except FileNotFoundError:
        found = "there is no such bucket or folder" if not source.exists() else f"it has no {MANIFEST}"
        raise UserError(f"{source} is not a finished model directory: {found}. Copy one there that `maverick convert` made.") from None
    folder = source / TEMPLATES
    for file in (*source.iterdir(), *(folder.iterdir() if folder.exists() else ())):
        if file.name == MANIFEST or any(file.match(pattern) for pattern in COMPANIONS):
            if (size := file.stat().length) > MAX_COMPANION:
                raise UserError(f"{file} has {size:,} bytes, more than the {MAX_COMPANION:,} of any such file: copy the directory again.")
            copy = destination / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
    (destination / PARAMS).write_text(str(source / PARAMS))
