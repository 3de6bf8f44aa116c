"""Conversions that are killed, fifty times over, and go on: nothing is lost, nothing is done twice, nothing half-made looks whole."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from maverick_jax.convert import Source, convert, open_source
from maverick_jax.convert.build.conversion import Part, plan_parts
from maverick_jax.convert.build.steps import plan_steps
from maverick_jax.convert.formats import places

ROOT = Path(__file__).parents[3]
BLOCK = 1 << 12  # a thousand chunks in a tiny model
TARGET = "int8"  # experts become two leaves each, the rest is copied
KILLS = 50

# Imports once; a fork per line of its input, before jax has started a thread, converts until it is killed. An attempt is killed after
# some seconds, or at one of its own events: a read, a sync, a rename, half a line of the journal. `finishing` counts events only from
# the last chunk on.
WORKER = """
import json, os, pathlib, signal, sys, threading, time
from maverick_jax.convert import Source, convert
from maverick_jax.convert.build import to_orbax
from maverick_jax.convert.formats import places
places.BLOCK = int(sys.argv[4])
write, count, lock = os.write, 0, threading.Lock()

def attempt(task):
    log = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    counting = not task.get("finishing")

    def is_last():
        global count
        with lock:
            count += counting
            return counting and count == task.get("event")

    def end():
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(function):
        def call(*args, **kwargs):
            if is_last():
                end()
            return function(*args, **kwargs)
        return call

    def write_half(descriptor, data):
        if is_last():
            write(descriptor, data[: len(data) // 2])
            end()
        return write(descriptor, data)

    def read(self, name, index):
        write(log, json.dumps([name, [[part.start, part.stop] for part in index]]).encode() + b"\\n")
        time.sleep(task.get("slow", 0))
        return original(self, name, index)

    def complete(*args):
        nonlocal counting
        counting = True
        return finish(*args)

    original, finish = Source.read, to_orbax._complete
    Source.read, to_orbax._complete, os.write = watched(read), complete, write_half
    for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (pathlib.Path, "write_text"), (pathlib.Path, "unlink")):
        setattr(owner, name, watched(getattr(owner, name)))
    convert(sys.argv[1], sys.argv[2], target=sys.argv[5], progress=False)

assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if not child:
        try:
            attempt(task)
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(repr(error))
            os._exit(1)
    if "delay" in task:
        time.sleep(task["delay"])
        os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Worker(NamedTuple):
    """A process that converts `source` to `out` and is killed in it; `log` is what the last attempt read."""

    process: subprocess.Popen
    source: Path
    out: Path
    log: Path

    def attempt(self, **task: Any) -> bool:
        """Whether it was killed; otherwise it went through."""
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        assert status in (0, signal.SIGKILL), self.process.communicate()
        return status != 0

    @property
    def partial(self) -> Path:
        return self.out.with_name("out.partial")

    @property
    def reads(self) -> set[tuple]:
        """Name and index of every slice that the last attempt read."""
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        return {(name, tuple(map(tuple, index))) for name, index in map(json.loads, lines)}


@pytest.fixture
def worker(maverick, tmp_path) -> Iterator[Worker]:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("whether a fork is safe is read from /proc")
    source, out, log = shutil.copytree(maverick.source, tmp_path / "source"), tmp_path / "out", tmp_path / "reads"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WORKER, source, out, log, str(BLOCK), TARGET],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    yield Worker(process, source, out, log)
    process.stdin.close()
    process.wait()
    process.stdout.close()
    process.stderr.close()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(places, "BLOCK", BLOCK)


def parts_of(directory: Path) -> list[Part]:
    source = open_source(directory)
    return plan_parts(source, plan_steps(source.config, source.parameters, TARGET, ("experts",)))


def read_of(part: Part) -> tuple:
    """As `Worker.reads` has it."""
    ((name, index),) = part.inputs
    return name, tuple((piece.start, piece.stop) for piece in index)


def chunk_files(partial: Path, part: Part) -> list[Path]:
    """Where Zarr puts the chunks of a part."""
    files = []
    for name, index in part.outputs:
        cell = [str(piece.start // size) for piece, size in zip(index, part.step.outputs[name].chunk, strict=True)]
        files.append(partial.joinpath("params/state", name, "c", *cell))
    return files


def noted(partial: Path) -> set[tuple[str, int]]:
    """Chunks in the journal's whole lines."""
    found = set()
    file = partial / "conversion.0.jsonl"
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if "parameter" in values:
                found.add((values["parameter"], values["chunk"]))
    return found


def is_noted(part: Part, chunks: set[tuple[str, int]]) -> bool:
    return all((name, part.number) in chunks for name in part.step.outputs)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file. A journal may be left if the very last step was cut off."""
    files = {str(file.relative_to(directory)): file for file in directory.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if name != "conversion.0.jsonl"}


def assert_same(directory: Path, other: Path) -> None:
    ours, theirs = contents(directory), contents(other)
    assert ours.keys() == theirs.keys()
    assert [name for name, content in ours.items() if content != theirs[name]] == []


def damage(file: Path, kind: int) -> None:
    """A bit flipped, the end lost, or all of it."""
    content = file.read_bytes()
    if kind == 0:
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif kind == 1:
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()


@pytest.fixture
def whole(worker, tmp_path, small_blocks) -> Path:
    """What an uninterrupted conversion makes."""
    convert(worker.source, tmp_path / "whole", target=TARGET, progress=False)
    return tmp_path / "whole"


def test_killed_at_every_step_of_the_beginning(worker, whole):
    """Before the first weight: directory, journal, Orbax's skeleton, its metadata. Half a skeleton must not be taken for a whole one."""
    for event in itertools.count(1):
        worker.log.unlink(missing_ok=True)
        assert worker.attempt(event=event)
        if worker.reads:
            break
        assert not worker.attempt()
        assert_same(worker.out, whole)
        shutil.rmtree(worker.out)
    assert event > 5


def test_fifty_kills_change_nothing(worker, whole):
    """The machine of a spot market is taken away whenever it is; the 800 GB that were written must be right and must not be begun again."""
    parts, chance, kills, ended = parts_of(worker.source), random.Random(0), 0, 0
    damaged: set[tuple] = set()
    moments = itertools.cycle(("event", "event", "delay", "event", "event", "finishing"))
    while kills < KILLS or worker.partial.exists():
        done = noted(worker.partial)
        if done and kills % 5 == 4 and (kept := [part for part in parts if is_noted(part, done) and read_of(part) not in damaged]):
            victim = chance.choice(kept)
            damage(chance.choice(chunk_files(worker.partial, victim)), kills // 5 % 3)
            damaged.add(read_of(victim))
        moment = next(moments) if kills < KILLS else "none"
        task = {
            "event": {"event": chance.randrange(1, 400)},
            "delay": {"delay": chance.uniform(0, 0.8), "slow": 0.005},
            "finishing": {"event": chance.randrange(1, 300), "finishing": True},
            "none": {},
        }[moment]
        worker.log.unlink(missing_ok=True)
        killed = worker.attempt(**task)
        kills += killed
        wanted = {read_of(part) for part in parts if not is_noted(part, done)} | damaged
        assert worker.reads <= wanted
        damaged -= worker.reads & {read_of(part) for part in parts if is_noted(part, done)}
        if not worker.out.exists():
            assert killed
            continue
        assert worker.reads == wanted
        assert_same(worker.out, whole)
        ended += 1
        damaged.clear()
        shutil.rmtree(worker.out)
    assert ended >= 1
    print(f"{kills} kills, {ended} conversions")


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["a bit flipped", "cut short", "gone"])
def test_a_chunk_that_is_no_longer_right_is_found_and_written_again(maverick, tmp_path, small_blocks, monkeypatch, kind):
    """The disk, not we: what is noted as written is looked at once more, and only what is wrong is read from the source."""
    source, out, reads = maverick.source, tmp_path / "out", []
    convert(source, tmp_path / "whole", target=TARGET, progress=False)
    read = Source.read
    with monkeypatch.context() as patch:
        patch.setattr("maverick_jax.convert.build.to_orbax._complete", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(source, out, target=TARGET, progress=False)
    victims = random.Random(kind).sample(parts_of(source), 5)
    for victim in victims:
        damage(chunk_files(tmp_path / "out.partial", victim)[-1], kind)
    monkeypatch.setattr(Source, "read", lambda self, *args: reads.append(args) or read(self, *args))
    summary = convert(source, out, target=TARGET, progress=False)
    assert sorted(map(str, reads)) == sorted(str(victim.inputs[0]) for victim in victims)
    assert summary.resumed == summary.bytes_written - sum(victim.bytes_written for victim in victims)
    assert_same(out, tmp_path / "whole")


def test_without_digests_a_chunk_that_is_gone_is_still_found(maverick, tmp_path, small_blocks, monkeypatch):
    """Missing or too short shows without reading; only changed bytes need digests."""
    with monkeypatch.context() as patch:
        patch.setattr("maverick_jax.convert.build.to_orbax._complete", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(maverick.source, tmp_path / "out", target=TARGET, digests=False, progress=False)
    for kind, victim in enumerate(random.Random(0).sample(parts_of(maverick.source), 2), 1):
        damage(chunk_files(tmp_path / "out.partial", victim)[0], kind)
    convert(maverick.source, tmp_path / "out", target=TARGET, digests=False, progress=False)
    convert(maverick.source, tmp_path / "whole", target=TARGET, digests=False, progress=False)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_other_options_do_not_go_on_with_it(maverick, tmp_path, monkeypatch, refused):
    """Half in int8 and half in bfloat16 has all names right."""
    with monkeypatch.context() as patch:
        patch.setattr("maverick_jax.convert.build.to_orbax._complete", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(maverick.source, tmp_path / "out", progress=False)
    with refused("out.partial was begun from another checkpoint or with other options, or the checkpoint has changed since: remove it"):
        convert(maverick.source, tmp_path / "out", target=TARGET, progress=False)
