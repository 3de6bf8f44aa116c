"""Orbax in our hands: its nested dicts against our dotted names, saving and reading without its warnings."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maverick_jax.convert.build.durable import sync
from maverick_jax.sharding import multihost

MARK = "no_array"
NOTHING = {
    "zarr_format": 2,
    "shape": [0],
    "chunks": [1],
    "dtype": "|u1",
    "fill_value": 0,
    "order": "C",
    "filters": None,
    "compressor": None,
}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts to dotted names."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {n: leaf for key, sub in tree.items() for n, leaf in flatten(sub, f"{prefix}.{key}" if prefix else str(key)).items()}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names to nested dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def save(path: Path, leaves: Mapping[str, Any]) -> None:
    """Save dotted names and their arrays, each as a Zarr 3 array in a folder of its own, without an OCDBT database around them."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = True
    with quiet(), context:
        ocp.save(str(path), unflatten(leaves))
    if multihost.is_first():
        _mark(path)


def _mark(path: Path) -> None:
    """Write what Orbax looks for in a checkpoint: `manifest.ocdbt`, or an array of Zarr 2 in any folder.

    It does not know arrays of Zarr 3 by sight, though it writes and reads them, and warns whoever loads a checkpoint without either that
    it may be malformed. This array has no elements and is nobody's.
    """
    file = path / "state" / MARK / ".zarray"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(NOTHING) + "\n")
    for path in (file, file.parent):
        sync(path)


def forget_occasion(path: Path) -> None:
    """Remove when and where a checkpoint was saved, so that the same weights are the same bytes."""
    # In an object store Orbax reads only a checkpoint that has this file.
    (path / "commit_success.txt").write_text("Checkpoint commit was successful\n")
    file = path / "_CHECKPOINT_METADATA"
    values = json.loads(file.read_text())
    _mark(path)  # a power cut may have taken the one of an earlier attempt
    beside = file.with_suffix(".new")  # renamed: half of it would be no metadata, and nobody would make them again
    beside.write_text(json.dumps(values | dict.fromkeys((name for name in values if name.endswith("_timestamp_nsecs")), 0)))
    sync(beside)
    beside.replace(file)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Orbax 0.12 warns of checkpoints without the mark, as they were made before we knew of it."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
