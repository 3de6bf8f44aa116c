"""What a user gets for a mistake: the tables of mistakes, and how one of them is tried.

The mistakes stand in `*.toml` beside this file, a table per area. Each is a command line or a line of Python, and ends in one line that
names what is wrong. Run as a script, this shows every line as a user would see it.

examples:
  python tests/mistakes/attempt.py
  python tests/mistakes/attempt.py convert
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT_S = 120  # of a mistake that is tried in a process of its own


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One thing that somebody did wrong.

    Attributes:
      did: what, in words.
      says: what the line must name.
      run: a command line after `maverick`; {tmp} is an empty folder, {mini} the embedded checkpoint, {model} a model directory of it.
      python: or a line of Python, with `mj`, `np`, `jnp`, `llama` (the mini model) and the three folders as paths.
      prepare: Python that comes before, such as making a damaged file in `tmp`.
      stdin, env: what the command reads.
      process: the command needs a process of its own, since it is about how one starts.
      status: the exit status.
    """

    table: str
    did: str
    says: list[str]
    run: str = ""
    python: str = ""
    prepare: str = ""
    stdin: str = ""
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    process: bool = False
    status: int = 2

    def __post_init__(self):
        assert bool(self.run) != bool(self.python), f"{self.did}: `run` or `python`"
        assert self.says, f"{self.did}: a line that names nothing"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a mistake left behind; `left` are files that were not there before."""

    status: int
    out: str
    err: str
    left: list[str]


def read_tables() -> list[Mistake]:
    """All mistakes, table by table."""
    tables = {file.stem: tomllib.loads(file.read_text(encoding="utf-8")) for file in sorted(HERE.glob("*.toml"))}
    return [Mistake(table=name, **values) for name, table in tables.items() for values in table["mistake"]]


def attempt(mistake: Mistake, names: dict[str, Any]) -> Outcome:
    """Try one; `names` has `tmp`, `mini`, `model` and, for Python, what else its line may use."""
    exec(mistake.prepare, {"json": json, "os": os, "shutil": shutil} | names)
    before = _files(names["tmp"])
    if mistake.python:
        status, out, err = _call(mistake.python, names)
    else:
        arguments = [part.format_map(names) for part in shlex.split(mistake.run)]
        env = {name: value.format_map(names) for name, value in mistake.env.items()}
        status, out, err = (_process if mistake.process else _main)(arguments, mistake.stdin, env)
    return Outcome(status, out, err, sorted(_files(names["tmp"]) - before))


def _call(line: str, names: dict[str, Any]) -> tuple[int, str, str]:
    from maverick_jax.errors import UserError

    try:
        exec(line, dict(names))
    except UserError as error:
        return 2, "", f"maverick: {error}\n"
    return 0, "", ""


def _main(arguments: list[str], stdin: str, env: dict[str, str]) -> tuple[int, str, str]:
    from maverick_jax.cli.main import main

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _streams(stdin, out, err), _environment(env):
            try:
                status = main(arguments)
            except SystemExit as end:
                status = end.code
        return status, _text_of(out), _text_of(err)


def _text_of(file) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


@contextlib.contextmanager
def _streams(stdin: str, out, err) -> Iterator[None]:
    """Standard streams of this process, those of C++ too, lead elsewhere."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, streams = (os.dup(1), os.dup(2)), (sys.stdin, sys.stdout, sys.stderr)
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode("utf-8", "surrogateescape")))
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(fd, "w", closefd=False), encoding="utf-8", line_buffering=True) for fd in (1, 2)
        )
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = streams
        for fd, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, fd)
            os.close(copy)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _process(arguments: list[str], stdin: str, env: dict[str, str]) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "maverick_jax", *arguments]
    done = subprocess.run(
        command, input=stdin.encode("utf-8", "surrogateescape"), env=os.environ | env, capture_output=True, timeout=LIMIT_S
    )
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def everything(folder: Path) -> dict[str, Any]:
    """The names that mistakes use, but for `tmp`; the model directory is made in `folder`."""
    import jax.numpy as jnp
    import numpy as np

    import maverick_jax as mj
    from maverick_jax.assets import mini_directory
    from maverick_jax.convert import convert

    model = folder / "model"
    convert(mini_directory(), model)
    return {"mj": mj, "np": np, "jnp": jnp, "mini": Path(mini_directory()), "model": model, "llama": mj.load()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help="such as convert (default: all)")
    tables = parser.parse_args().tables
    with tempfile.TemporaryDirectory() as folder:
        names = everything(Path(folder))
        for i, mistake in enumerate(mistake for mistake in read_tables() if not tables or mistake.table in tables):
            tmp = Path(folder) / str(i)
            tmp.mkdir()
            outcome = attempt(mistake, names | {"tmp": tmp})
            print(f"{mistake.did}\n  {mistake.run or mistake.python}\n  {outcome.status}  {outcome.err.strip()}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    sys.exit(main())
