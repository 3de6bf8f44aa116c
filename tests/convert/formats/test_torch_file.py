"""Files of `torch.save`: what torch reads is found where torch finds it, and what would be read as something else is refused."""

import io
import os
import pickle
import pickletools
import re
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from maverick_jax.convert.formats import torch_file
from maverick_jax.convert.formats.tensor_file import read_bytes
from maverick_jax.convert.formats.torch_archive import MAX_PICKLE, MAX_TABLE
from maverick_jax.convert.formats.torch_pickle import MAX_OPERATIONS
from maverick_jax.errors import UserError

MEMORY = 200 << 20  # bytes to refuse any file: what half a million operations may leave on a stack


def saved(entries, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(entries, buffer, **options)
    return buffer.getvalue()


def parameter_with_a_mark() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    parameter.tensor_model_parallel = True  # makes torch write another function
    return parameter


BLOCK = torch.arange(24, dtype=torch.float32).reshape(4, 6)
SAVED = {
    "every dtype": {name: torch.ones(3, 2).to(getattr(torch, name.removeprefix("torch."))) for name in torch_file.DTYPES},
    "a state dict": torch.nn.Linear(3, 2).state_dict(),
    "parameters": {"a": torch.nn.Parameter(torch.randn(2, 3)), "b": parameter_with_a_mark()},
    "one storage for two": {"a": BLOCK, "b": BLOCK[1:3], "c": BLOCK[2]},
    "axes of size 1": {"a": BLOCK[:, None, :1][:1], "b": BLOCK.T[:1, :1], "c": torch.ones(1).expand(1, 1)},
    "no elements, no axes": {"a": torch.zeros(0, 3), "b": torch.tensor(2.5), "c": torch.zeros(3, 0).T},
    "buffers beside them": {"a": torch.ones(2), "b": io.BytesIO(b"state"), "c": io.BytesIO(), "d": [1, 2.5, None, {3}, 1j, 2**70, ("x",)]},
    "views of a larger one": {"a": torch.arange(1000, dtype=torch.float16)[100:107]},
}


def values(tensor) -> bytes:
    out = bytearray(tensor.nbytes)
    read_bytes(tensor.file, tensor.offset, memoryview(out))
    return bytes(out)


@pytest.mark.parametrize("case", SAVED)
def test_bytes_are_those_that_torch_reads(tmp_path, case):
    """A wrong offset gives a model of noise, without a word."""
    file = tmp_path / "a.pth"
    torch.save(SAVED[case], file)
    found = torch_file.read_index(file)
    expected = {name: tensor for name, tensor in SAVED[case].items() if isinstance(tensor, torch.Tensor)}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert values(found[name]) == tensor.detach().reshape(-1).repeat(1).view(torch.uint8).numpy().tobytes(), name


def test_names_that_are_left_out_may_be_anything(tmp_path):
    (tmp_path / "a.pth").write_bytes(saved({"a": torch.ones(2), "steps": torch.ones(2, dtype=torch.int64)}))
    assert torch_file.read_index(tmp_path / "a.pth", without=re.compile("steps")).keys() == {"a"}


def records(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archived(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    return out.getvalue()


TENSORS = {"a": torch.arange(6, dtype=torch.float32), "b": torch.ones(4).bfloat16()}
LATER = ("byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")  # records that older versions did not write


@pytest.mark.parametrize("method", ["torch 1.6", "torch 2.0", "zip -0", "no checksums", "a name of its own", "a folder"])
def test_files_of_every_version_are_read(tmp_path, method):
    """Versions differ in what stands beside the data, and in whether it is aligned."""
    content = saved(TENSORS)
    entries = {name: entry for name, entry in records(content).items() if not name.endswith(LATER)}
    torch.serialization.set_crc32_options(method != "no checksums")
    content = {
        "torch 1.6": archived(entries),
        "torch 2.0": archived(entries | {"archive/byteorder": b"little"}),
        "zip -0": archived(records(content)),
        "no checksums": saved(TENSORS),
        "a name of its own": archived({name.replace("archive", "modèle"): entry for name, entry in entries.items()}),
        "a folder": archived({"archive/": b"", **entries}),
    }[method]
    torch.serialization.set_crc32_options(True)
    (tmp_path / "a.pth").write_bytes(content)
    found = torch_file.read_index(tmp_path / "a.pth")
    assert {name: values(tensor) for name, tensor in found.items()} == {
        name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in TENSORS.items()
    }


def with_pickle(data: bytes) -> bytes:
    return archived(records(saved(TENSORS)) | {"archive/data.pkl": data})


def pickle_of(change: Callable[[bytes], bytes]) -> bytes:
    """The file, with its pickle changed."""
    return with_pickle(change(records(saved(TENSORS))["archive/data.pkl"]))


def patched(content: bytes, name: str, *, table: dict[int, bytes] | None = None, header: dict[int, bytes] | None = None) -> bytes:
    """An archive in which some bytes of a record's entry in the table of contents, or of its own header, are others."""
    changed = bytearray(content)
    entry = next(at.start() for at in re.finditer(b"PK\1\2", content) if content[at.start() + 46 :].startswith(name.encode()))
    own = int.from_bytes(content[entry + 42 : entry + 46], "little")
    for begin, patches in ((entry, table or {}), (own, header or {})):
        for at, patch in patches.items():
            changed[begin + at : begin + at + len(patch)] = patch
    return bytes(changed)


def twice(content: bytes) -> bytes:
    """A record two times, as an archive that something was added to has it."""
    out = io.BytesIO(content)
    with zipfile.ZipFile(out, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", bytes(24))
    return out.getvalue()


def zip64(content: bytes, name: str, size: int) -> bytes:
    """A record whose sizes are said to be in an extra field, and are a lie there."""
    entry = next(at.start() for at in re.finditer(b"PK\1\2", content) if content[at.start() + 46 :].startswith(name.encode()))
    extra = struct.pack("<2H2Q", 1, 16, size, size)
    changed = bytearray(patched(content, name, table={20: b"\xff" * 8, 30: struct.pack("<H", len(extra))}))
    behind = entry + 46 + len(name)
    changed[behind:behind] = extra
    end = changed.rindex(b"PK\5\6")
    changed[end + 12 : end + 16] = struct.pack("<I", int.from_bytes(changed[end + 12 : end + 16], "little") + len(extra))
    return bytes(changed)


def tar_file() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return out.getvalue()


def table_of(size: int) -> bytes:
    """An archive that says that its table of contents has so many bytes, and has them."""
    return b"PK\3\4" + bytes(size) + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, size, 4, 0)


WHOLE = saved(TENSORS)
PLAIN = archived(records(WHOLE))
CUT = "ends before its table of contents does: the download is incomplete; fetch this file again."
DAMAGED = "is damaged or not a file of torch.save ("
NOT_PLAIN = {  # content of a file, and what is said of it
    "compressed": (
        archived(records(WHOLE), zipfile.ZIP_DEFLATED),
        "is compressed, which torch.save never does: fetch the released file, or load this one and save it again with torch.save.",
    ),
    "one record compressed": (patched(PLAIN, "archive/data/1", table={10: b"\x08\0"}), "archive/data/1 is compressed"),
    "compressed by its own header": (patched(PLAIN, "archive/data/1", header={8: b"\x08\0"}), f"{DAMAGED}archive/data/1 is not where"),
    "encrypted": (patched(PLAIN, "archive/data/0", table={8: b"\1\0"}), "archive/data/0 is encrypted, which torch.save never does"),
    "encrypted by its own header": (patched(PLAIN, "archive/data/0", header={6: b"\1\0"}), f"{DAMAGED}archive/data/0 is not where"),
    "bytes in another order": (
        archived(records(WHOLE) | {"archive/byteorder": b"big"}),
        "has bytes in b'big' order: load it where it was saved, and save it again on a little-endian machine.",
    ),
    "bytes in no order": (archived(records(WHOLE) | {"archive/byteorder": b"x" * 99_999}), "has bytes in b'xxxxxxxxxxxxxxxx' order"),
    "a record twice": (twice(PLAIN), f"{DAMAGED}two records have one name): fetch it again."),
    "records in one place": (
        patched(PLAIN, "archive/data/1", table={42: patched(PLAIN, "archive/data/0")[PLAIN.index(b"PK\1\2") + 42 :][:4]}),
        f"{DAMAGED}archive/data/1 is not where the table of contents says",
    ),
    "a record that goes on into the next": (
        patched(PLAIN, "archive/data/0", table={20: struct.pack("<2I", 60, 60)}),
        f"{DAMAGED}archive/data/0 shares bytes with what comes behind it): fetch it again.",
    ),
    "the last record into the table": (
        patched(PLAIN, "archive/.data/serialization_id", table={20: struct.pack("<2I", 99, 99)}),
        "archive/.data/serialization_id shares bytes with what comes behind it",
    ),
    "a record beyond the end": (
        patched(PLAIN, "archive/data/1", table={20: struct.pack("<2I", 10**9, 10**9)}),
        "ends before archive/data/1 does: the download is incomplete; fetch this file again.",
    ),
    "a record of an exabyte": (zip64(PLAIN, "archive/data/1", 10**18), "ends before archive/data/1 does: the download is incomplete"),
    "a record of more than 63 bits": (zip64(PLAIN, "archive/data/1", 2**64 - 1), "ends before archive/data/1 does"),
    "two sizes": (patched(PLAIN, "archive/data/0", table={20: struct.pack("<I", 4)}), f"{DAMAGED}archive/data/0 has 4 bytes and 24)"),
    "a header that is none": (patched(PLAIN, "archive/data/0", header={0: b"XX"}), "archive/data/0 is not where"),
    "another record's header": (patched(PLAIN, "archive/data/0", header={43: b"9"}), "archive/data/0 is not where"),
    "a table of contents of gigabytes": (table_of(MAX_TABLE + 1), f"{DAMAGED}a table of contents of 2,097,153 bytes): fetch it again."),
    "less data than the tensor has": (
        archived(records(WHOLE) | {"archive/data/0": bytes(20)}),
        "is damaged (the data of a has 20 bytes, and it says otherwise): fetch it again.",
    ),
    "more data than the tensor has": (archived(records(WHOLE) | {"archive/data/0": bytes(28)}), "the data of a has 28 bytes, and it says"),
    "no data": (archived({name: entry for name, entry in records(WHOLE).items() if "/data/" not in name}), "has no data of a: fetch it"),
    "no pickle": (archived({"archive/version": b"3\n"}), f"{DAMAGED}it has no archive/data.pkl): fetch it again."),
    "an empty archive": (archived({}), f"{DAMAGED}it has no /data.pkl): fetch it again."),
    "a pickle that was changed": (
        WHOLE.replace(b"storage", b"storagf"),
        f"{DAMAGED}archive/data.pkl has changed since it was written): fetch it again.",
    ),
    "format before 1.6": (saved(TENSORS, _use_new_zipfile_serialization=False), "is in torch's format before 1.6: load it and save it"),
    "format before 0.1": (tar_file(), "is in torch's format before 1.6: load it and save it again with torch.save."),
    "a bare pickle": (pickle.dumps({"a": 1}), f"{DAMAGED}File is not a zip file): fetch it again."),
    "the last byte lost": (WHOLE[:-1], CUT),
    "all but the first record lost": (WHOLE[:900], CUT),
    "its end lost in the last record": (WHOLE[: WHOLE.rindex(b"PK\1\2") - 300], CUT),
    "nothing": (b"", "is empty, for a download did not begin or a disk was full: fetch it again."),
    "a sparse tensor": (saved({"a": torch.eye(3).to_sparse()}), "holds more than tensors, none of which was run (it asks for "),
    "a negated view": (saved({"a": torch.ones(2, dtype=torch.complex64).conj().imag}), "holds more than tensors"),
    "not in C order": (saved({"a": BLOCK.T}), ": a is not stored in C order: save it contiguous."),
    "one element for many": (saved({"a": torch.ones(1).expand(5)}), ": a is not stored in C order: save it contiguous."),
    "another dtype": (saved({"a": torch.ones(2, dtype=torch.int64)}), "a has dtype torch.int64; torch.bfloat16, torch.float16"),
    "a name of two lines": (saved({"a\nb": torch.ones(2)}), "is damaged (a b has sizes that no tensor has)"),
}


def refusal(file: Path) -> str:
    """What is said of a file, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            torch_file.read_index(file)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 3000
    return str(error.value)


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_what_is_not_plain_is_refused(tmp_path, case):
    """torch takes compressed bytes for weights: all of Meta's 149 parameters were garbage, and converted."""
    content, message = NOT_PLAIN[case]
    (tmp_path / "a.pth").write_bytes(content)
    text = refusal(tmp_path / "a.pth")
    assert message in text
    assert "a.pth" in text


def test_what_is_no_file_is_refused_unopened(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    assert "a.pth is not a file: fetch it again." in refusal(tmp_path / "a.pth")


def nested(levels: int) -> bytes:
    """A tuple of two of a tuple of two of …, which is small until somebody looks into it."""
    return b")" + b"q\0h\0\x86" * levels


def entry(value: bytes, key: bytes = b"X\1\0\0\0a") -> bytes:
    return b"\x80\2}" + key + value + b"s."


def tensor(
    size: bytes = b"K\6\x85", offset: bytes = b"K\0", stride: bytes = b"K\1\x85", count: bytes = b"K\6", record: bytes = b"X\1\0\0\0000"
):
    """A tensor of the first storage."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\n" + record + b"X\3\0\0\0cpu" + count + b"tQ"
    return entry(b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89ccollections\nOrderedDict\n)RtR")


PICKLES = {  # and what is said of them
    "half a million operations": (b"\x80\2" + b"N" * MAX_OPERATIONS, "a pickle of more than 500,000 operations"),
    "marks": (b"\x80\2" + b"(" * (MAX_OPERATIONS - 2) + b".", "a pickle of values more than 100 deep"),
    "a text of gigabytes": (b"\x80\2X\xff\xff\xff\xff", "expected 4294967295 bytes"),
    "a number of gigabytes": (b"\x80\2\x8b\xff\xff\xff\x7f", "not enough data in stream"),
    "a million digits": (b"\x80\2L" + b"9" * 1_000_000 + b"L\n.", "Exceeds the limit"),
    "a far place in memory": (b"\x80\2Nr\xff\xff\xff\xff.", "holds no dict of tensors"),
    "a place that nothing is in": (b"\x80\2h\7.", "7"),
    "a key that takes for ever": (entry(b"N", key=nested(20)), "a key that is neither text nor number"),  # doubles with each level
    "a value that is large if looked at": (entry(nested(200)), None),
    "a value of itself": (entry(b"]q\0h\0a"), None),
    "depth": (entry(b"".join([b")", b"\x85" * 200_000])), None),
    "calls in calls": (entry(b"ctorch._tensor\n_rebuild_from_type_v2\n" * 2 + b"N)N(tR"), "(call|tuple|range)"),
    "a command": (b"cos\nsystem\n(X\4\0\0\0truetR.", "holds more than tensors, none of which was run (it asks for os.system by name)"),
    "a command by an old operation": (b"(S'true'\nios\nsystem\n.", "holds more than tensors, none of which was run (operation "),
    "a command by a new operation": (b"\x80\4\x8c\2os\x8c\6system\x93.", "holds more than tensors"),
    "an attribute of torch": (b"\x80\2ctorch\nload\n.", "it asks for torch.load by name"),
    "protocol 4": (pickle.dumps({"a": 1}, protocol=4), "holds more than tensors, none of which was run (operation FRAME"),
    "no dict": (b"\x80\2].", "holds no dict of tensors"),
    "an end without a value": (b"\x80\2.", "pop from empty list"),
    "no end": (b"\x80\2}", "pickle exhausted before seeing STOP"),
    "no such operation": (b"\x80\2\xff", "opcode"),
    "an item of no list": (b"\x80\2}NNa.", "an item of what is no list"),
    "an entry of no dict": (b"\x80\2]NNs.", "an entry of what is no dict"),
    "a key without value": (b"\x80\2}(Nu.", "shorter"),
    "a call of a number": (b"\x80\2K\1)R.", "a call of what is no function"),
    "a larger shape": (tensor(size=b"K\7\x85"), "is damaged (a is larger than its data)"),
    "an offset": (tensor(offset=b"K\1"), "is damaged (a is larger than its data)"),
    "a shape of more than 63 bits": (tensor(size=b"\x8a\x09" + b"\xff" * 8 + b"\0\x85"), "a has sizes that no tensor has"),
    "a negative offset": (tensor(offset=b"J\xff\xff\xff\xff"), "a has sizes that no tensor has"),
    "a fraction": (tensor(size=b"G" + struct.pack(">d", 6.0) + b"\x85"), "a has sizes that no tensor has"),
    "a truth value": (tensor(offset=b"\x88"), "a has sizes that no tensor has"),
    "a shape that is no tuple": (tensor(size=b"K\6"), "a has sizes that no tensor has"),
    "a stride too few": (tensor(stride=b")"), "a has sizes that no tensor has"),
    "more elements than data": (tensor(count=b"K\7"), "the data of a has 24 bytes, and it says otherwise"),
    "a count that is no number": (tensor(count=b"X\1\0\0\0006"), "a has sizes that no tensor has"),
    "data that is not there": (tensor(record=b"X\1\0\0\0009"), "has no data of a"),
    "data of no name": (tensor(record=b"]"), "has no data of a"),
    "data somewhere else": (tensor(record=b"X\x0a\0\0\0../version"), "has no data of a"),
    "none of these": (tensor(), None),
}  # fmt: skip


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_is_read_or_refused_in_little_memory(tmp_path, case):
    """2 MB took 6.6 GB before they were refused."""
    data, message = PICKLES[case]
    assert len(data) < MAX_PICKLE
    (tmp_path / "a.pth").write_bytes(with_pickle(data))
    if message is None:
        torch_file.read_index(tmp_path / "a.pth")
    else:
        text = refusal(tmp_path / "a.pth")
        assert re.search(message if message.startswith("(") else re.escape(message), text), text


def test_a_large_pickle_is_not_read(tmp_path):
    (tmp_path / "a.pth").write_bytes(with_pickle(b"\x80\2" + bytes(MAX_PICKLE)))
    assert "archive/data.pkl has 8,388,610 bytes, more than the 8,388,608 of any checkpoint" in refusal(tmp_path / "a.pth")


def test_a_small_file_does_not_unfold(tmp_path):
    """A megabyte of compressed zeros is a gigabyte; it is refused by its name in the table of contents."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as stream:
        for _ in range(64):
            stream.write(bytes(1 << 20))
    (tmp_path / "a.pth").write_bytes(out.getvalue())
    assert "archive/data.pkl is compressed" in refusal(tmp_path / "a.pth")


def test_the_tensor_that_the_pickles_change_is_in_order(tmp_path):
    """Or all of them would be refused for another reason."""
    (tmp_path / "a.pth").write_bytes(with_pickle(tensor()))
    found = torch_file.read_index(tmp_path / "a.pth")["a"]
    assert np.frombuffer(values(found), np.float32).tolist() == [0, 1, 2, 3, 4, 5]
    assert [op.name for op, _, _ in pickletools.genops(tensor())][-3:] == ["REDUCE", "SETITEM", "STOP"]
