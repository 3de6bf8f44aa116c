"""Compiled programs are kept on disk from one command to the next: to compile takes ten seconds, to read them half of one."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import glob
import hashlib
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from maverick_jax.cli import streams
from maverick_jax.cli.options import note

OFF = ("", "none")
MOST_BYTES = 4 << 30
_TROUBLE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)", re.DOTALL)  # jax's warnings


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compilation-cache",
        type=str,
        metavar="DIR",
        help="where compiled programs are kept for the next command, or none (default: $JAX_COMPILATION_CACHE_DIR, or maverick-jax "
        "in $XDG_CACHE_HOME or ~/.cache)",
    )


def programs_kept(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """For a command that compiles."""

    @functools.wraps(run)
    def keeping(args: argparse.Namespace) -> int:
        with kept(args.compilation_cache):
            return run(args)

    return keeping


@contextlib.contextmanager
def kept(asked: str | None) -> Iterator[None]:
    """jax's cache in our folder, and its troubles a note at most; afterwards jax is set as before."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    of_jax = jax.config.values["jax_compilation_cache_dir"]
    folder = _folder(asked, of_jax)
    ours = asked is not None or not of_jax  # else it is the user's, with settings of his own
    settings = {"jax_compilation_cache_dir": folder}
    if ours:
        settings |= {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        with _troubles_told(folder if ours else None):
            yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def _folder(asked: str | None, of_jax: str | None) -> str | None:
    """Where to keep programs; None: nowhere."""
    if asked in OFF:
        return None
    if asked is None:
        if of_jax:
            return of_jax
        home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        if not home.is_absolute():  # a user who has no home
            return None
        root = home / "maverick-jax"
    elif "://" in asked:  # a bucket, which jax opens
        return asked
    else:
        root = Path(asked).absolute()
    folder = root / _this_kind_of_machine()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # who can write here can have his code run
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        _forget_oldest(folder)
    except OSError as error:
        _say(streams.reason(error))
        return None
    return str(folder)


def _this_kind_of_machine() -> str:
    """Differs between CPUs of different instructions: a program for one can end another's process, and homes are shared."""
    about = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about = "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}))
    return f"{platform.machine()}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"


def _forget_oldest(folder: Path) -> None:
    """jax's own limit needs a lock at every look, and a process killed at the wrong moment breaks it for ever."""
    found = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(folder))
    excess = sum(size for _, size, _ in found) - MOST_BYTES
    for _, size, path in found:
        if excess <= 0:
            return
        excess -= size
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            os.unlink(path)


@contextlib.contextmanager
def _troubles_told(folder: str | None) -> Iterator[None]:
    """jax warns of an entry that it cannot read, at every start anew, since it never writes over one: such an entry goes."""
    told = False

    def show(message: Warning | str, category: type[Warning], *place, **more) -> None:
        nonlocal told
        trouble = _TROUBLE.match(str(message))
        if not trouble or not folder:
            shown(message, category, *place, **more)
        elif trouble[1] == "reading":
            for entry in Path(folder).glob(f"{glob.escape(trouble[2])}-*"):
                entry.unlink(missing_ok=True)
        elif not told:
            told = True
            _say(" ".join(trouble[3].split()))

    with warnings.catch_warnings():
        warnings.filterwarnings("always", _TROUBLE.pattern)
        shown, warnings.showwarning = warnings.showwarning, show
        yield


def _say(reason: str) -> None:
    note(f"maverick: note: compiled programs are not kept for the next command: {reason}")
