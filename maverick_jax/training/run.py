"""What a run is, in RUN/run.json: the same command goes on with it, another is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maverick_jax.config.checks import show
from maverick_jax.errors import UserError
from maverick_jax.json_file import read_json
from maverick_jax.sharding import multihost

RUN = "run.json"


def check_place(out: Path) -> None:
    """Refuse a directory that holds something else than a run, before anything is read."""
    if out.is_file():
        raise UserError(f"{out} is a file: name the directory of a run.")
    if out.is_dir() and any(out.iterdir()) and not (out / RUN).is_file():
        raise UserError(f"{out} exists and is no run: name a new directory.")


def begin_run(out: Path, identity: Mapping[str, Any]) -> None:
    """Begin a run, or see that the one that is there is this one; what is new of what it is becomes a part of it.

    Raises:
      UserError: names what is different, and how.
    """
    check_place(out)
    file, mine = out / RUN, json.loads(json.dumps(identity))
    there = read_json(file) if file.is_file() else {}
    for name in mine:
        if name in there and there[name] != mine[name]:
            raise UserError(
                f"{out} is a run with another {name}: {show(there[name])} there, {show(mine[name])} now. Name a new directory, or run the "
                "command that began it."
            )
    if multihost.is_first():
        out.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".new")
        beside.write_text(json.dumps({**there, **mine}, indent=1) + "\n")
        beside.replace(file)
