"""Digests: XXH3 of tensors and chunks, SHA-256 of files, and the follower that takes both behind a conversion."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from maverick_jax.convert.formats.tensor_file import Tensor, forget, read_bytes

BLOCK = 1 << 20


class FileDigest(NamedTuple):
    """What a source file held when it was read."""

    sha256: str
    tensors: dict[str, str]  # stored name -> XXH3 of its bytes in the file


def digest_array(values: np.ndarray) -> str:
    """XXH3 (128 bits) of an array's bytes in C order."""
    return xxhash.xxh3_128_hexdigest(values.reshape(-1).view(np.uint8).data)


def digest_chunk(file: Path) -> str:
    """`digest_array` of what a chunk's file holds."""
    digest, buffer, at, size = xxhash.xxh3_128(), memoryview(bytearray(BLOCK)), 0, file.stat().st_size
    while at < size:
        block = buffer[: min(BLOCK, size - at)]
        read_bytes(file, at, block)
        digest.update(block)
        at += len(block)
    return digest.hexdigest()


def digest_chunks(chunks: Iterable[str]) -> str:
    """Of a tensor: XXH3 of the digests of its chunks' files in C order."""
    return digest_text("".join(chunks))


def digest_text(text: str) -> str:
    """XXH3 (128 bits) of a text."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def digest_file(file: Path) -> str:
    """SHA-256 of a whole file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Files(Protocol):
    """What lies in a source's files."""

    @property
    def known(self) -> Mapping[str, str]: ...

    def stored_in(self, file: Path) -> Mapping[str, Tensor]: ...


class Follower:
    """Digests of a source's files, taken behind a conversion: each byte once more, but from the system's cache.

    Parts of the conversion are done in any order; a file is followed up to the first byte that is still to be read by one.

    Args:
      files: those to digest.
      parts: the spans of every part, `Source.spans`.
    """

    def __init__(self, source: Files, files: Iterable[Path], parts: list[list[tuple[Path, int, int]]]):
        self._files = {file: _File(file, source) for file in files}
        self._waiting: dict[Path, list[tuple[int, int]]] = {file: [] for file in self._files}
        for number, spans in enumerate(parts):
            for file, begin, _ in spans:
                if file in self._files:
                    self._waiting[file].append((begin, number))
        for waiting in self._waiting.values():
            waiting.sort(reverse=True)
        self._parts, self._done, self._lock = parts, [False] * len(parts), threading.Lock()

    def done(self, number: int) -> None:
        """Note that a part is done, and follow in its files."""
        self._done[number] = True
        for file in dict.fromkeys(file for file, _, _ in self._parts[number] if file in self._files):
            state = self._files[file]
            while self._read_up_to(file) > state.at and state.lock.acquire(blocking=False):  # whoever has the lock comes back for us
                try:
                    state.advance(self._read_up_to(file))
                finally:
                    state.lock.release()

    def finish(self, file: Path) -> FileDigest:
        """Read what is left of a file, and give its digests."""
        state = self._files[file]
        with state.lock:
            state.advance(state.size)
            return state.result()

    def _read_up_to(self, file: Path) -> int:
        with self._lock:
            waiting = self._waiting[file]
            while waiting and self._done[waiting[-1][1]]:
                waiting.pop()
            return waiting[-1][0] if waiting else self._files[file].size


class _File:
    """How far a file has been digested."""

    def __init__(self, file: Path, source: Files):
        self.file, self.size, self.at = file, file.stat().st_size, 0
        self.lock = threading.Lock()
        self._sha256 = hashlib.sha256()
        self._tensors = sorted(
            (tensor.offset, tensor.offset + tensor.nbytes, name, xxhash.xxh3_128()) for name, tensor in source.stored_in(file).items()
        )
        self._known = source.known
        self._current = 0

    def advance(self, end: int) -> None:
        buffer = np.empty(BLOCK, np.uint8)
        begin = self.at
        while self.at < end:
            block = buffer[: min(BLOCK, end - self.at)].data
            read_bytes(self.file, self.at, block)
            self._sha256.update(block)
            self._update_tensors(block)
            self.at += len(block)
        forget(self.file, begin, end)

    def _update_tensors(self, block: memoryview) -> None:
        while self._current < len(self._tensors):
            begin, end, _, digest = self._tensors[self._current]
            digest.update(block[max(0, begin - self.at) : max(0, end - self.at)])
            if end > self.at + len(block):
                return
            self._current += 1

    def result(self) -> FileDigest:
        return FileDigest(self._sha256.hexdigest(), {**self._known, **{name: digest.hexdigest() for _, _, name, digest in self._tensors}})
