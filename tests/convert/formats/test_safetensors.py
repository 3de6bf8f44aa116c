"""Reading slices of safetensors files, against numpy, the library, and another table of names."""

import json
import re
import tracemalloc

import numpy as np
import pytest

from maverick_jax.convert import open_source
from maverick_jax.convert.formats import safetensors, tensor_file
from maverick_jax.errors import UserError
from maverick_jax.json_file import MAX_BYTES
from oracle.port import convert as expected_parameter


@pytest.fixture(params=[64, 4096, tensor_file.SCRATCH])
def scratch(request, monkeypatch):
    """Reads smaller than a row, than a matrix, and larger than either."""
    monkeypatch.setattr(tensor_file, "SCRATCH", request.param)


def test_every_parameter_is_what_transformers_has(case):
    source = open_source(case.source)
    tensors = case.tensors
    for name, (shape, dtype) in source.parameters.items():
        assert dtype == "bfloat16"
        values = source.read(name, (slice(None),) * len(shape))
        np.testing.assert_array_equal(values.astype(np.float32), expected_parameter(name, shape, tensors), err_msg=name)


@pytest.mark.parametrize(
    "name",
    [
        "text.embedding",
        "text.unembedding",
        "text.layers.0.attention.query",
        "text.layers.0.attention.output",
        "text.layers.1.feed_forward.experts.gate",
        "text.layers.1.feed_forward.experts.up",
        "text.layers.1.feed_forward.experts.down",
        "vision.layers.0.attention.query_bias",
        "vision.class_embedding",
    ],
)
def test_a_slice_is_that_slice_of_the_whole(maverick, scratch, name):
    source = open_source(maverick.source)
    shape, _ = source.parameters[name]
    whole = expected_parameter(name, shape, maverick.tensors)
    random = np.random.default_rng(0)
    for _ in range(12):
        starts = [random.integers(0, size) for size in shape]
        index = tuple(slice(int(start), int(random.integers(start + 1, size + 1))) for start, size in zip(starts, shape, strict=True))
        np.testing.assert_array_equal(source.read(name, index).astype(np.float32), whole[index], err_msg=str(index))


def test_a_slice_reads_little_more_than_itself(maverick, monkeypatch):
    """A reader that takes whole stacks of experts would need 21 GB for one of Maverick's."""
    source = open_source(maverick.source)
    read = []
    preadv = tensor_file.os.preadv
    monkeypatch.setattr(tensor_file.os, "preadv", lambda *args: read.append(preadv(*args)) or read[-1])
    values = source.read("text.layers.1.feed_forward.experts.down", (slice(3, 4), slice(0, 96), slice(0, 160)))
    assert sum(read) == values.nbytes
    read.clear()
    values = source.read("text.layers.1.feed_forward.experts.gate", (slice(3, 4), slice(0, 160), slice(0, 96)))
    assert sum(read) == 2 * values.nbytes  # gate and up share the rows


def test_headers_of_every_dtype_survive_the_library(tmp_path):
    """Our writer's file opens in the library, and the library's in our reader."""
    from safetensors.numpy import load_file, save_file

    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3, dtype=np.float16), "c": np.float32([])}
    header = safetensors.make_header({name: (values.shape, values.dtype) for name, values in tensors.items()})
    (tmp_path / "ours").write_bytes(header + b"".join(values.tobytes() for values in tensors.values()))
    save_file(tensors, tmp_path / "library")
    for name, values in load_file(tmp_path / "ours").items():
        np.testing.assert_array_equal(values, tensors[name], strict=True)
    for file in ("ours", "library"):
        found = safetensors.read_header(tmp_path / file)
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {n: (v.shape, v.dtype) for n, v in tensors.items()}


def test_bfloat16_and_fp8_are_where_the_library_put_them(tmp_path):
    """Neither exists in numpy's own loader; torch's library is the witness."""
    import torch
    from safetensors.torch import save_file

    tensors = {"wide": torch.randn(3, 5).bfloat16(), "narrow": torch.randn(7, 3).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "model.safetensors")
    for name, tensor in safetensors.read_header(tmp_path / "model.safetensors").items():
        out = np.empty(tensor.shape, tensor.dtype)
        tensor_file.read_box(tensor.file, tensor.offset, tensor.shape, tuple(slice(0, size) for size in tensor.shape), out)
        assert tensor.dtype.name == str(tensors[name].dtype).removeprefix("torch.")
        assert out.tobytes() == tensors[name].view(torch.uint8).numpy().tobytes()


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
MUTILATED = {
    "empty": (b"", "is empty, for a download did not begin or a disk was full: fetch it again"),
    "a web page": (b"<!DOCTYPE html><html>", "is a page of HTML, as a server sends where a login is missing: fetch it again"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of git-lfs.*: run `git lfs pull`"),
    "a server's words": (b"Entry not found", "is text, a server's answer in the place of the file .'Entry not found'"),
    "another format": (b"GGUF\3\0\0\0\0\0\0\0", "is a GGUF file .llama.cpp., which is not read"),
    "a byte": (b"\1", "is not a safetensors file"),
    "ends in the header": ((1000).to_bytes(8, "little") + b"{}", "ends 998 bytes before its header does"),
    "no JSON": ((4).to_bytes(8, "little") + b"[1,2", "damaged header"),
    "no object": ((5).to_bytes(8, "little") + b"[1,2]", "damaged header"),
    "entry without shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, "damaged header"),
    "bytes against shape": ({"a": ENTRY | {"shape": [2, 4]}}, r"shape \[2, 4\] of F32 does not take bytes 0 to 24"),
    "negative offset": ({"a": ENTRY | {"data_offsets": [-24, 0]}}, "a size or an offset is not a number of bytes that a file can have"),
    "overlap": ({"a": ENTRY, "b": ENTRY}, "b does not begin where a ends"),
    "gap": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [48, 72]}}, "b does not begin where a ends"),
    "no dtype that is known": ({"a": ENTRY | {"dtype": "F4"}}, "a has dtype F4; BF16, F16, F32, F8_E4M3, .* are known"),
    "truncated": ({"a": ENTRY | {"shape": [2, 4], "data_offsets": [0, 32]}}, "ends 8 bytes before `a` does: the download is incomplete"),
    "a tensor larger than any file": (
        {"a": ENTRY | {"shape": [10**18], "data_offsets": [0, 4 * 10**18]}},
        f"ends {4 * 10**18 - 24} bytes before `a` does",
    ),
    "a shape larger than its bytes": ({"a": ENTRY | {"shape": [10**18, 10**18]}}, "does not take bytes 0 to 24"),
    "a size of more than 63 bits": ({"a": ENTRY | {"shape": [10**30]}}, "a size or an offset is not a number of bytes"),
    "an offset of more than 63 bits": ({"a": ENTRY | {"data_offsets": [10**30, 10**30 + 24]}}, "a size or an offset is not a number"),
    "a far offset": ({"a": ENTRY | {"data_offsets": [10**18, 10**18 + 24]}}, "a does not begin where its header ends"),
    "end before begin": ({"a": ENTRY | {"data_offsets": [24, 0]}}, "does not take bytes 24 to 0"),
    "a fraction": ({"a": ENTRY | {"shape": [2.0, 3]}}, "a size or an offset is not a number of bytes"),
    "a truth value": ({"a": ENTRY | {"shape": [True, 6]}}, "a size or an offset is not a number of bytes"),
    "a header of an exabyte": ((10**18).to_bytes(8, "little") + b"{}", "is not a safetensors file"),
    "a name twice": (b'{"a": {}, "a": {}}', "a appears twice"),
    "nested too deep": (b"[" * 100_000, "damaged header"),
    "too long": ({"a": ENTRY | {"shape": [2, 2], "data_offsets": [0, 16]}}, "goes on for 8 bytes after its last tensor"),
}


@pytest.mark.parametrize("case", MUTILATED)
def test_a_header_that_cannot_be_is_refused(tmp_path, case):
    content, message = MUTILATED[case]
    if isinstance(content, dict):
        text = json.dumps(content).encode()
        content = len(text).to_bytes(8, "little") + text + bytes(24)
    elif content[:1] in (b"{", b"["):
        content = len(content).to_bytes(8, "little") + content
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        safetensors.read_header(file)
    assert str(file) in str(error.value)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(10))
    with pytest.raises(UserError, match=r"model\.safetensors became shorter"):
        tensor_file.read_box(file, 0, (6,), (slice(0, 6),), np.empty(6, np.float32))


BOMBS = {  # what fills a header, and what is said of it
    "lists": (b'{"a":[' + b"[]," * 5_000_000 + b"0]}", "values, more than the 1,000,000 that there may be"),
    "nested lists": (b'{"a":[' + b"[[[[[[]]]]]]," * 1_000_000 + b"0]}", "values, more than the 1,000,000 that there may be"),
    "tensors": (
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[],"data_offsets":[0,0]}' % i for i in range(200_000)) + b"}",
        "values, more than the 1,000,000 that there may be",
    ),
    "spaces": (b"{" + b" " * 89_999_998 + b"}", "has a header of 90,000,000 bytes, more than the 16,777,216 of 100,000 tensors"),
    "a name": (b'{"' + b"x" * 10_000_000 + b'":{"dtype":"F32"}}', "has a damaged header ('shape'): fetch it again."),
    "digits": (b'{"a":' + b"9" * 10_000_000 + b"}", "has a damaged header (Exceeds the limit"),
    "depth": (b"[" * 900_000, "has a damaged header (maximum recursion depth exceeded"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_header_takes_no_more_memory_than_its_size(tmp_path, bomb):
    """One of 90 MB took 28 seconds and 1.7 GB before it was refused."""
    text, message = BOMBS[bomb]
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=re.escape(message)) as error:
            safetensors.read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 4 * min(len(text), MAX_BYTES) + (1 << 20)
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 3000


def test_the_largest_header_that_a_release_could_have_is_read(tmp_path):
    """All 19,445 tensors of Maverick's FP8 checkpoint in one file, twice over."""
    entries = {
        f"language_model.model.layers.{i}.feed_forward.experts.{i % 128}.gate_proj.weight_scale": {
            "dtype": "F8_E4M3",
            "shape": [8192, 0],
            "data_offsets": [0, 0],
        }
        for i in range(2 * 19_445)
    }
    text = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert len(safetensors.read_header(tmp_path / "model.safetensors")) == 2 * 19_445


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "\ud800", "a\u202eb"])
def test_a_name_that_no_terminal_shows_is_refused(tmp_path, name):
    """`inspect` prints names: one that is half a character ended it with a traceback."""
    text = json.dumps({name: ENTRY}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    with pytest.raises(UserError, match="is no name of a tensor") as error:
        safetensors.read_header(tmp_path / "model.safetensors")
    assert str(error.value).isprintable()
