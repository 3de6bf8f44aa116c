"""A directory that is either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path

from maverick_jax.convert.build.durable import sync, sync_tree
from maverick_jax.convert.formats.recognize import local_path
from maverick_jax.errors import UserError
from maverick_jax.sharding import multihost, roll_call

MARK = "seen_by_all."  # followed by a name that no other run has


class SpoiltError(UserError):
    """What has been built so far is wrong, and no later attempt may go on with it."""


@contextlib.contextmanager
def building(out: Path, *, afresh: Collection[str] | None = None) -> Iterator[Path]:
    """`OUT.partial/`, ours alone; when the block ends without an exception it is synced and becomes OUT in one rename.

    Args:
      afresh: patterns of what an earlier attempt may have left, which is removed; anything else there is refused. None goes on
        with what is there.

    Raises:
      UserError: OUT exists, another process is building it, or the disk is full. What is built stays for the next attempt, but for
        one that would begin afresh, or after a `SpoiltError`.
    """
    refuse_existing(out)
    partial = partial_directory(out)
    new = [folder for folder in out.parents if not os.path.exists(folder)]
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{partial} cannot be made ({error.strerror}): choose another destination.") from error
    try:
        _lock(descriptor, partial)
        with _leaving_nothing_useless(partial, new, afresh):
            refuse_existing(out)  # the process that held the lock until now may have finished it
            for stale in partial.glob(f"{MARK}*"):  # of a run that was killed
                stale.unlink()
            yield partial
            sync_tree(partial)
            partial.rename(out)
        for folder in (out.parent, *(folder.parent for folder in new)):  # which have a new name in them
            with contextlib.suppress(PermissionError):  # to write into a directory one need not be allowed to read it
                sync(folder)
    except Exception as error:
        if not _is_full(error):
            raise
        stays = f" (what is done stays in {partial})" if afresh is None else ""
        raise UserError(f"no space left on the disk of {out}: free some, then run this again{stays}.") from error
    finally:
        os.close(descriptor)


def _lock(descriptor: int, partial: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing {partial}: wait for it to end.") from None
    except OSError:  # some shared file systems have no locks
        pass


@contextlib.contextmanager
def _leaving_nothing_useless(partial: Path, new: list[Path], afresh: Collection[str] | None) -> Iterator[None]:
    """After a failure, remove what no later attempt can use: all that would be begun afresh, what is spoilt, or empty directories."""
    if afresh is not None:
        _empty(partial, afresh)
    try:
        yield
    except BaseException as error:
        if afresh is not None or isinstance(error, SpoiltError):
            shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in (partial, *new):
                if folder.exists():
                    folder.rmdir()
        raise


def _empty(partial: Path, patterns: Collection[str]) -> None:
    """Remove what an attempt that starts anew left, if there is nothing else."""
    entries = list(partial.iterdir())
    for entry in entries:
        if not any(entry.match(pattern.partition("/")[0]) for pattern in patterns):
            raise UserError(f"{partial} holds {entry.name}, which is of something else: move it away, or choose another name.")
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextlib.contextmanager
def building_together(out: Path) -> Iterator[Path]:
    """`building` by all processes of a run: process 0 makes the directory and renames it when every process has left the block.

    Raises:
      UserError: as `building`; or a process does not see the directory that process 0 made.
    """
    with contextlib.ExitStack() as stack:
        partial = stack.enter_context(building(out)) if multihost.is_first() else partial_directory(out)
        if multihost.process_count() > 1:
            _check_seen(partial)
        yield partial
        multihost.exchange("written")
    multihost.exchange("renamed")


def _check_seen(partial: Path) -> None:
    """Whether all processes see the directory that process 0 has made, by a mark in it."""
    first, name = multihost.is_first(), f"{MARK}{uuid.uuid4().hex}"
    if first:
        (partial / name).touch()
    mark = partial / multihost.exchange(name)[0]
    missing = [process for process, sees in enumerate(multihost.exchange(mark.exists())) if not sees]
    if first:
        mark.unlink()
    multihost.exchange("looked")  # only now does anyone ask what is in the directory
    if missing:
        raise UserError(
            f"{roll_call.processes(missing)} cannot see {partial}, which process 0 made: give all processes one directory that they share."
        )


def partial_directory(out: Path) -> Path:
    """Where OUT is built."""
    return out.with_name(f"{out.name}.partial")


def require_space(directory: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for."""
    place = next(folder for folder in (directory, *directory.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"the disk of {directory} has {free:,} bytes free, {needed:,} are needed: free some, then run this again.")


def refuse_existing(out: Path) -> None:
    """What is there is kept."""
    if os.path.lexists(out):
        raise UserError(f"{out} exists: choose another destination, or remove it first.")


def find_destination(path: str | Path) -> Path:
    """The directory to be made, in a place where one can be made.

    Raises:
      UserError: it exists, it has no name of its own, or nothing can be written there.
    """
    out = local_path(path)
    if out.name in ("", ".."):
        raise UserError(f"{out} has no name of its own: name the directory that is to be made.")
    refuse_existing(out)
    place = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not place.is_dir():
        raise UserError(f"{out} cannot be made, for {place} is no directory: choose another destination.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{out} cannot be made, for you may not write into {place}: choose another destination.")
    return out


def refuse_inside(out: Path, source: Path) -> None:
    """Neither in what is read nor around it."""
    here, there = (Path(os.path.realpath(path)) for path in (out, source))
    if here.is_relative_to(there):
        raise UserError(f"{out} is inside {source}, which is read: choose a destination outside.")
    if there.is_relative_to(partial_directory(here)):
        raise UserError(f"{source} is where {out} would be built: move it, or choose another destination.")


def _is_full(error: Exception) -> bool:
    """Whether the disk, or the user's share of it, is full; TensorStore says so in words only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in full) or any(os.strerror(code) in str(error) for code in full)
