"""Thousands of damaged headers, indexes and pickles: each is read or refused in one line, at once, in the memory of its own size."""

import contextlib
import copy
import io
import json
import random
import signal
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from maverick_jax.convert.formats import safetensors, torch_file
from maverick_jax.convert.formats.shards import INDEX, read_tensors
from maverick_jax.errors import UserError

SEEDS, HEADERS, INDEXES, PICKLES = range(10), 1200, 300, 200  # of each seed
MEMORY = 1 << 20  # bytes beyond the file's size: JSON's objects, and the message
SECONDS = 2.0  # for one file of a few kilobytes, on a machine that does other things too
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}

Pairs = list[tuple[str, Any]]  # a JSON object whose keys may come twice


def make_tensors() -> dict[str, np.ndarray]:
    return {f"layers.{i}.{name}": np.ones((2, 3 + i), dtype) for i, (name, dtype) in enumerate(DTYPES.items())}


def make_file(tensors: dict[str, np.ndarray]) -> tuple[Pairs, bytes]:
    """Header and data of a file that is in order."""
    header: Pairs = [("__metadata__", [("format", "pt")])]
    data = b""
    spelling = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    for name, values in tensors.items():
        ends = [len(data), len(data) + values.nbytes]
        header.append((name, [("dtype", spelling[values.dtype]), ("shape", list(values.shape)), ("data_offsets", ends)]))
        data += values.tobytes()
    return header, data


def is_object(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, tuple) for item in value)


def spell(value: Any) -> str:
    """As JSON; objects are lists of pairs, so that a key may come twice."""
    if isinstance(value, Raw):
        return value.text
    if is_object(value):
        return "{" + ",".join(f"{json.dumps(key)}:{spell(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(spell, value)) + "]"
    return json.dumps(value)


class Raw:
    """JSON text as it is."""

    def __init__(self, text: str):
        self.text = text


# fmt: off
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**18, 10**30, 0.0, 2.0, -1.5, 1e308,
    "", "x", "F32", "I64", "\u0000", "\ud800", "ключ", "🦙" * 50, "../x", "/etc/passwd", "a\nb", "x" * 5000, "2" * 5000,
    [], [[]], [0], [0, 0], [None], [-1, 0], [10**18], [1] * 9, [0] * 40, [[1], [2]], [0, 10**18], [10**9, 10**9], [2, 3, 0], ["2", "3"],
    [("a", 1)], [("dtype", "F32")], Raw("{}"), Raw(""), Raw("'x'"), Raw("\\"),
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000), Raw("-0"),
    Raw("[" * 900 + "]" * 900), Raw("[" * 30_000), Raw('{"a":' * 20_000), Raw('{"a":' * 500 + "1" + "}" * 500),
)
# fmt: on


def containers(value: Any) -> Iterator[list]:
    """All objects and arrays of a header."""
    if isinstance(value, list):
        yield value
        for item in value:
            yield from containers(item[1] if isinstance(item, tuple) else item)


def mutate_json(chance: random.Random, value: list) -> None:
    """Change one thing in place: a value, a key, an entry lost, doubled, moved, or one too many."""
    target = chance.choice([some for some in containers(value) if some] or [value])
    at = chance.randrange(len(target)) if target else 0
    what = chance.randrange(7) if target else 6
    strange = copy.deepcopy(chance.choice(STRANGE))
    if what == 0:
        del target[at]
    elif what == 1:
        target.append(copy.deepcopy(target[at]))
    elif what == 2:
        chance.shuffle(target)
    elif what == 3 and isinstance(target[at], tuple):
        target[at] = (strange if isinstance(strange, str) else chance.choice([key for key, _ in target]), target[at][1])
    elif what == 4 and isinstance(target[at], int):
        target[at] += chance.choice([-(10**18), -1, 1, 2, 8, 10**18])
    elif what == 6:
        target.append((chance.choice(["x", "dtype", "__metadata__"]), strange) if is_object(target) else strange)
    else:
        target[at] = (target[at][0], strange) if isinstance(target[at], tuple) else strange


def mutate_bytes(chance: random.Random, content: bytes) -> bytes:
    """Bytes changed, cut off, put in, left out, or repeated."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        at = chance.randrange(len(changed)) if changed else 0
        end = min(len(changed), at + chance.choice([1, 2, 8, 100]))
        what = chance.randrange(6)
        if what == 0 and changed:
            changed[at] ^= 1 << chance.randrange(8)
        elif what == 1 and changed:
            changed[at] = chance.randrange(256)
        elif what == 2:
            del changed[at:]
        elif what == 3:
            changed[at:at] = chance.choice([b"\0", b"{", b"}", b'"', b",", b"[" * 2000, chance.randbytes(7)])
        elif what == 4:
            del changed[at:end]
        else:
            changed[at:at] = changed[at:end]
    return bytes(changed)


@contextlib.contextmanager
def bounded(size: int) -> Iterator[None]:
    """Ends what hangs, and asserts little time and memory."""

    def end(*_):
        raise AssertionError("still not done")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    tracemalloc.reset_peak()
    memory, begin = tracemalloc.get_traced_memory()[0], time.process_time()
    try:
        yield
    finally:
        seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seconds < SECONDS
    assert peak - memory < size + MEMORY


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def assert_one_line(error: UserError) -> None:
    assert "\n" not in str(error)


def read_or_refuse(read: Callable[[], dict], size: int) -> dict | None:
    """What was read; None if it was refused, in one line."""
    try:
        with bounded(size):
            return read()
    except UserError as error:
        assert_one_line(error)
        return None


def damaged_file(chance: random.Random, header: Pairs, data: bytes) -> bytes:
    """A file with a damaged header, at the level of JSON, of its bytes, or of the length before it."""
    kind = chance.choice(["json", "json", "json", "bytes", "bytes", "length", "file"])
    if kind == "json":
        header = copy.deepcopy(header)
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            mutate_json(chance, header)
    text = spell(header).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        text = mutate_bytes(chance, text)
    length = len(text)
    if kind == "length":
        length = chance.choice([0, 1, 2, 3, length - 1, length + 1, length + 1000, 10**8, 10**8 + 1, 10**18, 2**63, 2**64 - 1])
    content = length.to_bytes(8, "little") + text + data
    return mutate_bytes(chance, content) if kind == "file" else content


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_header_is_refused_or_all_its_tensors_are_in_the_file(tmp_path, seed):
    """Downloads break off, disks flip bits, and strangers write files: none of it may crash, hang, or point outside the file."""
    chance = random.Random(seed)
    header, data = make_file(make_tensors())
    file, read = tmp_path / "model.safetensors", 0
    for number in range(HEADERS):
        content = damaged_file(chance, header, data)
        file.write_bytes(content)
        try:
            tensors = read_or_refuse(lambda: safetensors.read_header(file), len(content))
        except BaseException as error:
            raise AssertionError(f"file {number} of seed {seed}: {content[:2000]!r}") from error
        if tensors is None:
            continue
        read += 1
        begin = 8 + int.from_bytes(content[:8], "little")
        for name, tensor in tensors.items():
            assert begin <= tensor.offset <= tensor.offset + tensor.nbytes <= len(content), (name, content[:2000])
    assert 0 < read < HEADERS / 2  # harmless changes, as of a name, are among them


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_index_is_refused_or_all_its_tensors_are_in_its_files(tmp_path, seed):
    """An index that names files elsewhere, or tensors twice, or is nested a thousand deep."""
    chance = random.Random(seed)
    tensors = list(make_tensors().items())
    where: Pairs = []
    for shard in range(2):
        name, some = f"model-{shard + 1:05}-of-00002.safetensors", dict(tensors[shard * 2 : shard * 2 + 2])
        header, data = make_file(some)
        text = spell(header).encode()
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text + data)
        where += [(tensor, name) for tensor in some]
    size, read = sum(file.stat().st_size for file in tmp_path.iterdir()), 0
    for number in range(INDEXES):
        index: Pairs = [("metadata", [("total_size", 100)]), ("weight_map", copy.deepcopy(where))]
        if damage_json := chance.random() < 0.7:
            for _ in range(chance.choice([1, 1, 2])):
                mutate_json(chance, index)
        text = spell(index).encode("utf-8", "surrogatepass")
        content = text if damage_json else mutate_bytes(chance, text)
        (tmp_path / INDEX).write_bytes(content)
        try:
            found = read_or_refuse(lambda: read_tensors(tmp_path), size + len(content))
        except BaseException as error:
            raise AssertionError(f"index {number} of seed {seed}: {content[:2000]!r}") from error
        if found is not None:
            read += 1
            assert found.keys() == dict(tensors).keys()
            assert all(tensor.file.parent == tmp_path for tensor in found.values())
    assert 0 < read < INDEXES / 2


@pytest.fixture(scope="module")
def pickled(module_path) -> bytes:
    """A small file of `torch.save`."""
    import torch

    file = module_path / "consolidated.00.pth"
    torch.save({"a.weight": torch.ones(3, 4).bfloat16(), "a._extra_state": io.BytesIO(b"state"), "b": torch.zeros(5)}, file)
    return file.read_bytes()


def damaged_archive(chance: random.Random, content: bytes) -> bytes:
    """Bytes of the archive changed, or those of the pickle in it, whose checksum is then right again, or some records compressed."""
    if chance.random() < 0.5:
        return mutate_bytes(chance, content)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as changed:
        for name in archive.namelist():
            entry = archive.read(name)
            method = chance.choice([zipfile.ZIP_STORED] * 20 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
            changed.writestr(name, mutate_bytes(chance, entry) if name.endswith("data.pkl") else entry, method)
    return out.getvalue()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_pickle_is_refused_or_all_its_tensors_are_in_the_file(tmp_path, pickled, seed):
    """A pickle is a program, and an archive says twice where everything is: neither is believed."""
    chance, file, read = random.Random(seed), tmp_path / "consolidated.00.pth", 0
    for number in range(PICKLES):
        content = damaged_archive(chance, pickled)
        file.write_bytes(content)
        try:
            tensors = read_or_refuse(lambda: torch_file.read_index(file), len(content))
        except BaseException as error:
            raise AssertionError(f"file {number} of seed {seed}: {content!r}") from error
        if tensors is not None:
            read += 1
            assert all(0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(content) for tensor in tensors.values())
    assert 0 < read < PICKLES


def test_many_names_and_one_of_them_twice(tmp_path):
    """To look for it must not take the square of their number: the largest header that is allowed has millions."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = "{" + ",".join(f'"{i}":{entry}' for i in [*range(10_000), 9_999]) + "}"
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    begin = time.process_time()
    with pytest.raises(UserError, match="9999 appears twice"):
        safetensors.read_header(file)
    assert time.process_time() - begin < SECONDS


def test_the_generator_makes_what_is_in_order(tmp_path: Path):
    """Were the undamaged file refused, so would be all the damaged ones, and nothing would be tested."""
    header, data = make_file(make_tensors())
    text = spell(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    found = safetensors.read_header(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {name: values.shape for name, values in make_tensors().items()}
