"""What is on the disk when: the order of syncs and renames, which a kill cannot show, for the system's cache outlives the process."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from maverick_jax.checkpoint import load, save
from maverick_jax.convert import convert, export
from maverick_jax.convert.build.writer import BESIDE, SKELETON


class Event(NamedTuple):
    """A sync or a rename: of which file or directory, and what it was then."""

    what: str
    path: Path  # for a rename, the new one
    before: Path
    inode: int
    state: tuple[int, int]  # when it was changed last, and its size
    unsynced: list[str]  # at a rename: what, in the file or directory, was changed since its last sync


class Recorder:
    """Calls of `os.fsync`, `os.rename` and `os.replace`, in order."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.events: list[Event] = []
        self._synced: dict[int, tuple[int, int]] = {}
        fsync = os.fsync
        patch.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), self._note_sync(descriptor)))
        for name in ("rename", "replace"):
            patch.setattr(os, name, self._watched(getattr(os, name)))

    def _note_sync(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        self._synced[found.st_ino] = state = (found.st_mtime_ns, found.st_size)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.events.append(Event("sync", path, path, found.st_ino, state, []))

    def _watched(self, rename: Callable) -> Callable:
        def call(before, after, **options):
            found = os.stat(before)
            inside = [before, *(Path(folder, name) for folder, folders, files in os.walk(before) for name in folders + files)]
            unsynced = [str(path) for path in inside if self._synced.get(os.stat(path).st_ino) != _state(os.stat(path))]
            rename(before, after, **options)
            self.events.append(Event("rename", Path(after), Path(before), found.st_ino, _state(found), unsynced))

        return call

    def index(self, what: str, path: Path) -> int:
        """Of the first such event."""
        return next(at for at, event in enumerate(self.events) if (event.what, event.path) == (what, path))


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_mtime_ns, found.st_size


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("which file a descriptor is of is read from /proc")
    return Recorder(monkeypatch)


@pytest.fixture
def converted(maverick, tmp_path, recorder) -> tuple[Path, Recorder]:
    """A conversion to a place whose parents are not there yet, and what was called."""
    out = tmp_path / "a/b/out"
    convert(maverick.source, out, workers=1, progress=False)
    return out, recorder


def test_a_chunk_is_whole_on_the_disk_before_it_has_its_name(converted):
    """Else a power cut leaves chunks of zeros under names that say they are done."""
    _, recorder = converted
    chunks = [event for event in recorder.events if event.what == "rename" and event.before.parent.name == BESIDE]
    assert len(chunks) > 50
    assert [event.path for event in chunks if event.unsynced] == []


def test_what_was_begun_is_on_the_disk_before_anything_else(converted):
    """The first line of the journal, and its name: else the next attempt finds a directory that nobody began, and refuses it."""
    out, recorder = converted
    partial = out.with_name("out.partial")
    line, name = recorder.index("sync", partial / "conversion.0.jsonl"), recorder.index("sync", partial)
    assert line < name
    assert recorder.events[line].state[1] > 100  # the line was in it
    assert name < min(at for at, event in enumerate(recorder.events) if event.what == "rename")


def test_orbax_files_are_on_the_disk_before_they_have_their_names(converted):
    """The skeleton is taken for whole by later attempts, and its metadata is replaced: neither is made again."""
    out, recorder = converted
    params = out.with_name("out.partial") / "params"
    skeleton = recorder.events[recorder.index("rename", params)]
    assert skeleton.before.name == SKELETON
    arrays = {f"{skeleton.before}/state/{file.parent.name}" for file in converted[0].glob("params/state/*/zarr.json")}  # made anew
    assert [path for path in skeleton.unsynced if not path.startswith(tuple(arrays))] == []
    replaced = recorder.events[recorder.index("rename", params / "_CHECKPOINT_METADATA")]
    assert replaced.unsynced == []


def test_all_is_on_the_disk_before_it_looks_finished(converted, maverick, tmp_path, recorder):
    """Chunks, files, and every directory with the names in it; then the names of what was renamed, and of the directories over it."""
    save(load(maverick.converted), tmp_path / "saved")
    export(maverick.converted, tmp_path / "exported", progress=False)
    for out in (converted[0], tmp_path / "saved", tmp_path / "exported"):
        at = recorder.index("rename", out)
        assert recorder.events[at].unsynced == []
        later = [event.path for event in recorder.events[at:] if event.what == "sync"]
        assert out.parent in later
    later = [event.path for event in recorder.events[recorder.index("rename", converted[0]) :] if event.what == "sync"]
    assert {tmp_path / "a/b", tmp_path / "a", tmp_path} <= set(later)
