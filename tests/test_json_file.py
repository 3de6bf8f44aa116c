"""JSON files of strangers: read, or refused in one line in the memory of their own size."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from maverick_jax.config import Config
from maverick_jax.errors import LONGEST, UserError
from maverick_jax.json_file import MAX_BYTES, MAX_VALUES, read_json


def peak_of_refusal(file: Path, message: str, read=read_json) -> int:
    """Bytes that it took to refuse a file."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as error:
            read(file)
        assert "\n" not in str(error.value)
        assert str(file.name) in str(error.value)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_was_written_is_read(tmp_path):
    values = {"a": [1, 2.5, None, "ключ 🦙"], "b": {"c": True}}
    (tmp_path / "file.json").write_text(json.dumps(values))
    assert read_json(tmp_path / "file.json") == values


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    """A config of 10 GB filled the memory before it was found to be none."""
    for name, read in (("file.json", read_json), ("config.json", lambda file: Config.from_directory(file.parent))):
        (tmp_path / name).write_text("{")
        os.truncate(tmp_path / name, 10_000_000_000)
        assert peak_of_refusal(tmp_path / name, "has 10,000,000,000 bytes, more than the 16,777,216", read) < 1 << 20


@pytest.mark.parametrize("unit", ["[],", "1,", '{"a":1},', "[" * 9 + "]" * 9 + ",", '{"":' * 9 + "0" + "}" * 9 + ",", '"ab",'])
def test_a_file_of_a_million_values_is_not_parsed(tmp_path, unit):
    """Three bytes of text can become a list of 72: 16 MB would become half a gigabyte."""
    values = sum(map(unit.count, ",[{"))
    (tmp_path / "file.json").write_text("[" + unit * (MAX_VALUES // values + 1) + "0]")
    size = (tmp_path / "file.json").stat().st_size
    assert size < MAX_BYTES
    assert peak_of_refusal(tmp_path / "file.json", "values, more than the 1,000,000") < size + (1 << 20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[1]", "holds no JSON object"),
        (b"", "is empty, for a download did not begin"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
        (b" <!doctype html>", "is a page of HTML"),
    ],
)
def test_what_is_no_object_is_refused(tmp_path, content, message):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "file.json")


def test_what_is_no_file_is_refused_unopened(tmp_path):
    """To open a pipe that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "device.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "folder.json", "device.json"):
        with pytest.raises(UserError, match=f"{name} is not a file: fetch it again"):
            read_json(tmp_path / name)
    with pytest.raises(UserError, match=r"absent\.json cannot be read \(No such file or directory\)"):
        read_json(tmp_path / "absent.json")


def test_what_a_file_says_is_quoted_in_one_short_line_of_letters():
    """A name of a megabyte, or one that clears the terminal, comes from a file that somebody sent."""
    text = str(UserError("file \x1b[2J\u202e has\ttoo\nmuch\x85of " + "x" * 1_000_000 + ": fetch it again."))
    assert text.isprintable()
    assert text.startswith("file \\x1b[2J\\u202e has\\ttoo much of xxx")
    assert text.endswith("xxx: fetch it again.")
    assert len(text) < LONGEST + 100
