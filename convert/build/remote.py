"""A model directory in an object store: its small files are fetched, its weights are read where they are.

The local copy has a file `params` with the address of the weights in the place of the folder `params/`.
"""

from __future__ import annotations

import functools
import tempfile
from typing import TYPE_CHECKING

from maverick_jax.convert.formats.companions import COMPANIONS, MANIFEST, MAX_COMPANION, PARAMS, TEMPLATES
from maverick_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

STORE = "gs://"


@functools.cache
def fetch(url: str) -> tempfile.TemporaryDirectory:
    """The local copy of `gs://bucket/model`, kept until the process ends.

    Raises:
      UserError: no access, what it takes is not installed, or there is no finished model directory.
    """
    from etils import epath

    if not url.startswith(STORE):
        raise UserError(f"{url}: of object stores only {STORE} is supported.")
    local = tempfile.TemporaryDirectory(prefix="maverick-")
    try:
        _copy(epath.Path(url), epath.Path(local.name))
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"reading {url} takes gcsfs: pip install 'maverick-jax[gcs]'.") from error
    except Exception as error:  # the client raises many kinds: no such bucket, no credentials, no network
        raise UserError(f"{url} cannot be read: {error}") from error
    return local


def _copy(source: epath.Path, destination: epath.Path) -> None:
    if not (source / MANIFEST).exists():
        raise UserError(f"{source} is not a finished model directory: it has no {MANIFEST}. Copy one there that `maverick convert` made.")
    folder = source / TEMPLATES
    for file in (*source.iterdir(), *(folder.iterdir() if folder.exists() else ())):
        if file.name == MANIFEST or any(file.match(pattern) for pattern in COMPANIONS):
            if (size := file.stat().length) > MAX_COMPANION:
                raise UserError(f"{file} has {size:,} bytes, more than the {MAX_COMPANION:,} of any such file: copy the directory again.")
            copy = destination / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
    (destination / PARAMS).write_text(str(source / PARAMS))
