"""The work of a conversion, cut into parts that any thread of any process can do, again if need be."""

from __future__ import annotations

import concurrent.futures
import math
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from maverick_jax.convert.build.digest import FileDigest, Follower, digest_array, digest_chunk
from maverick_jax.convert.build.journal import Journal
from maverick_jax.convert.build.model_source import ModelSource
from maverick_jax.convert.build.steps import Step
from maverick_jax.convert.build.writer import Writer
from maverick_jax.convert.formats.places import Index
from maverick_jax.convert.formats.source import Source
from maverick_jax.convert.formats.tensor_file import forget
from maverick_jax.errors import UserError

WORKERS, MOST_WORKERS = 4, 256
IN_FLIGHT = 400 << 20  # bytes that all threads hold together: the bound on our memory
KEEP_CACHED = 256 << 20  # bytes of a file left in the system's cache behind us: the halves of gate|up are read one after the other
NOT_FINITE = {  # dtype -> bits without the sign, and the least pattern of them that is infinite or no number
    "bfloat16": (0x7FFF, 0x7F80),
    "float16": (0x7FFF, 0x7C00),
    "float32": (0x7FFFFFFF, 0x7F800000),
    "float8_e4m3fn": (0x7F, 0x7F),
}
CHECKED_AT_ONCE = 1 << 18  # elements, which stay in the processor's cache


class Part(NamedTuple):
    """A slice of a weight: what is read, changed and written at once.

    Attributes:
      number: which of the weight's slices.
      spans: where its bytes lie in the source's files.
    """

    step: Step
    number: int
    index: Index
    spans: list[tuple[Path, int, int]]

    @property
    def inputs(self) -> list[tuple[str, Index]]:
        return self.step.input_slices(self.index)

    @property
    def outputs(self) -> list[tuple[str, Index]]:
        return self.step.output_slices(self.index)

    @property
    def bytes_read(self) -> int:
        return sum(_size(index) * self.step.inputs[name][1].itemsize for name, index in self.inputs)

    @property
    def bytes_written(self) -> int:
        return sum(_size(index) * self.step.outputs[name].dtype.itemsize for name, index in self.outputs)


def plan_parts(source: Source | ModelSource, steps: Iterable[Step]) -> list[Part]:
    """All parts in the order of the source's files: each is read from front to back."""
    parts = []
    for step in steps:
        for number, index in enumerate(step.indices):
            spans = [span for leaf, some in step.input_slices(index) for span in source.spans(leaf, some)]
            parts.append(Part(step, number, index, spans))
    return sorted(parts, key=lambda part: part.spans[0][:2])


def share(parts: list[Part], process: int, count: int) -> list[Part]:
    """What one of several processes does: neighbours in the files, an even share of the bytes."""
    ends = np.cumsum([part.bytes_read for part in parts])
    first, last = np.searchsorted(ends, [ends[-1] * process / count, ends[-1] * (process + 1) / count], side="left")
    return parts[first : last if process + 1 < count else None]


def choose_workers(workers: int | None) -> int:
    """Threads: what is asked for, or `WORKERS`, or the machine's cores if they are fewer."""
    if workers is None:
        return min(WORKERS, os.cpu_count() or 1)
    if type(workers) is not int or not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"workers is {workers!r:.40}: give a number of threads from 1 to {MOST_WORKERS}, or none.")
    return workers


def do_parts(
    source: Source | ModelSource, parts: list[Part], do: Callable[[Part], None], files: list[Path] | None, *, workers: int, bar: tqdm
) -> dict[Path, FileDigest]:
    """`do` every part in threads, and digest `files` behind them; None lets the system forget what was read instead.

    Raises:
      What went wrong in any thread; the others stop after the part they are at.
    """
    follower = Follower(source, files or [], [part.spans for part in parts])

    def work(number: int) -> None:
        part = parts[number]
        do(part)
        bar.set_postfix_str(part.step.weight, refresh=False)
        bar.update(part.bytes_read)
        follower.done(number)
        if files is None:
            for file, begin, _ in part.spans:
                forget(file, 0, max(0, begin - KEEP_CACHED))

    largest = max((part.bytes_read + part.step.held_between + part.bytes_written for part in parts), default=1)
    with concurrent.futures.ThreadPoolExecutor(max(1, min(workers, IN_FLIGHT // largest))) as pool:
        try:
            for _ in pool.map(work, range(len(parts))):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {file: follower.finish(file) for file in files or []}


class Conversion:
    """Does parts and notes them.

    Attributes:
      resumed: bytes that were there and were found to be right.
    """

    def __init__(self, source: Source | ModelSource, journal: Journal, writer: Writer, *, digests: bool):
        self.source, self.journal, self.writer, self.digests = source, journal, writer, digests
        self.resumed = 0
        self._lock = threading.Lock()

    def run(self, parts: list[Part], files: list[Path], *, workers: int, bar: tqdm) -> None:
        """Do all parts that are not done, and digest the files.

        Raises:
          What went wrong in any thread; the others stop after the part they are at.
        """
        files = [file for file in files if file.name not in self.journal.files]
        digests = do_parts(self.source, parts, self._do, files if self.digests else None, workers=workers, bar=bar)
        for file, digest in digests.items():
            self.journal.note_file(file.name, digest)

    def _do(self, part: Part) -> None:
        if self._is_done(part):
            with self._lock:
                self.resumed += part.bytes_written
            return
        arrays = part.step.read(self.source, part.index)
        made = part.step.run(arrays)
        if not all(map(is_finite, arrays if part.step.target is None else [*arrays, *made])):  # a cast may overflow
            self.journal.note_not_finite(part.step.weight)
        for (name, index), values in zip(part.outputs, made, strict=True):
            written = self.writer.write(name, index, values)
            self.journal.note_chunk(name, part.number, digest_array(written) if self.digests else None)

    def is_noted(self, part: Part) -> bool:
        """Whether an earlier attempt wrote it."""
        return all((name, part.number) in self.journal.chunks for name, _ in part.outputs)

    def _is_done(self, part: Part) -> bool:
        """Whether an earlier attempt wrote it, and the disk still has what it wrote."""
        if not self.is_noted(part):
            return False
        for name, index in part.outputs:
            file, leaf = self.writer.chunk_file(name, index), part.step.outputs[name]
            if not file.is_file() or file.stat().st_size != math.prod(leaf.chunk) * leaf.dtype.itemsize:
                return False
            if self.digests and digest_chunk(file) != self.journal.chunks[name, part.number]:
                return False
        return True


def is_finite(values: np.ndarray) -> bool:
    """Whether all values are numbers, by their bits: twenty times as fast as `np.isfinite` for bfloat16."""
    if values.dtype.name not in NOT_FINITE:
        return True
    bits, least = NOT_FINITE[values.dtype.name]
    flat = values.reshape(-1).view(f"u{values.itemsize}")
    blocks = (flat[at : at + CHECKED_AT_ONCE] for at in range(0, flat.size, CHECKED_AT_ONCE))
    return all((block & flat.dtype.type(bits)).max() < least for block in blocks)


def _size(index: Index) -> int:
    return math.prod(part.stop - part.start for part in index)
