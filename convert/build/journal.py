"""What an unfinished conversion has done, line by line, so that it can be killed at any moment and go on."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from maverick_jax.convert.build.digest import FileDigest
from maverick_jax.convert.build.durable import sync
from maverick_jax.errors import UserError

NAME = "conversion.{}.jsonl"  # with the number of the process


class Journal:
    """Files of JSON lines in the unfinished directory, one per process. The first line of each says what is converted into what.

    A chunk is noted when it is on disk, so what is noted and gone, or changed, is the disk's fault, and is found.

    Attributes:
      task: what is converted into what.
      chunks: (parameter, number of the slice) -> digest; None where none was taken.
      files: source file -> its digests.
      not_finite: weights in which something is infinite or no number.

    Raises:
      UserError: the directory was begun from something else.
    """

    def __init__(self, directory: Path, task: dict[str, Any], process: int = 0):
        self.chunks: dict[tuple[str, int], str | None] = {}
        self.files: dict[str, FileDigest] = {}
        self.not_finite: set[str] = set()
        self.task, self._directory, self._lock = task, directory, threading.Lock()
        self.read()
        self._descriptor = os.open(directory / NAME.format(process), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        # What was being written when the process was killed becomes a line of its own, which nobody reads.
        self._write(task, before=b"\n")
        os.fsync(self._descriptor)  # without these a power cut would leave a directory that nobody began
        sync(directory)

    def read(self) -> None:
        """Take in what all processes, now or in earlier attempts, have noted."""
        entries = sorted(self._directory.iterdir())  # listed once: another process may be about to begin its own
        files = [file for file in entries if fnmatch(file.name, NAME.format("*"))]
        begun = [line for file in files for line in itertools.islice(_lines(file), 1)]
        others = [file for file in entries if file not in files]
        if (others and not begun) or any(line != self.task for line in begun):
            raise UserError(
                f"{self._directory} was begun from another checkpoint or with other options, or the checkpoint has changed since: "
                "remove it, then run this again."
            )
        for file in files:
            for line in _lines(file):
                with contextlib.suppress(LookupError, TypeError):
                    self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if "file" in line:
            self.files[line["file"]] = FileDigest(line["sha256"], line["tensors"])
        elif "parameter" in line:
            self.chunks[line["parameter"], line["chunk"]] = line["digest"]
        elif "not_finite" in line:
            self.not_finite.add(line["not_finite"])

    def note_chunk(self, parameter: str, chunk: int, digest: str | None) -> None:
        self._write({"parameter": parameter, "chunk": chunk, "digest": digest})

    def note_file(self, name: str, digest: FileDigest) -> None:
        self._write({"file": name, **digest._asdict()})

    def note_not_finite(self, weight: str) -> None:
        self._write({"not_finite": weight})

    def _write(self, values: dict[str, Any], before: bytes = b"") -> None:
        with self._lock:
            os.write(self._descriptor, before + json.dumps(values).encode() + b"\n")

    def close(self) -> None:
        os.close(self._descriptor)

    @staticmethod
    def remove(directory: Path) -> None:
        """From the complete directory."""
        for file in directory.glob(NAME.format("*")):
            file.unlink()


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, without what a sudden end has cut short."""
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as stream:
        for text in stream:
            with contextlib.suppress(ValueError):
                if isinstance(line := json.loads(text), dict):
                    yield line
