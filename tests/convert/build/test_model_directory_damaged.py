"""Model directories that somebody changed, by accident or not: each is read or refused in one line by every command."""

import contextlib
import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maverick_jax.checkpoint import load
from maverick_jax.convert import export, inspect, open_model_directory
from maverick_jax.convert.build.manifest import FORM, _digest
from maverick_jax.convert.formats.companions import MANIFEST
from maverick_jax.convert.proof.verify import verify
from maverick_jax.errors import UserError

NORM = "text.norm"
VALUES = (None, True, 0, -1, 10**30, 1.5, "", "x", "../../x", "/dev/zero", [], [0], [None], ["x"], {}, {"x": 1}, {"x": {}}, [[[]]])
PICKED = 4  # of the changed manifests that can be read, for the commands that take longer


@pytest.fixture
def model(maverick, tmp_path) -> Path:
    """A model directory to damage."""
    return shutil.copytree(maverick.converted, tmp_path / "model")


def signed(manifest: dict[str, Any]) -> str:
    """With its own digest, as whoever changes it on purpose would write it."""
    manifest = {name: value for name, value in manifest.items() if name != "sha256"}
    return json.dumps(manifest | {"sha256": _digest(manifest)})


def edit(directory: Path, change) -> None:
    file = directory / MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(signed(manifest))


def places(manifest: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Where something can be changed: every fact, and of many tensors, files and sources one."""
    for name, value in manifest.items():
        yield (name,)
        if name in ("tensors", "files", "source"):
            key = NORM if name == "tensors" else next(iter(value))
            yield (name, key)
            yield from ((name, key, inner) for inner in value[key] if isinstance(value[key], dict))


def changed(manifest: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    manifest = copy.deepcopy(manifest)
    *parents, last = place
    target = manifest
    for parent in parents:
        target = target[parent]
    target[last] = value
    return manifest


@contextlib.contextmanager
def one_line(what: object) -> Iterator[None]:
    try:
        yield
    except UserError:  # which is one line whatever it says
        pass
    except Exception as error:
        raise AssertionError(what) from error


def test_a_manifest_of_any_types_is_read_or_refused(model, tmp_path, monkeypatch):
    """`maverick verify` of what somebody sent must not end in a traceback, or look at files elsewhere."""
    file = model / MANIFEST
    manifest = json.loads(file.read_text())
    readable = []
    for place in places(manifest):
        for value in VALUES if place[0] in FORM else VALUES[1:3]:
            content = signed(changed(manifest, place, value))
            file.write_text(content)
            with one_line((place, value)):
                open_model_directory(model)
                readable.append((place, value, content))
    assert {place[0] for place, _, _ in readable} >= {"kind", "parameters", "libraries"}  # for people
    assert not any(place == ("tensors", NORM, name) for place, _, _ in readable for name in ("shape", "dtype"))
    looked_at = []
    monkeypatch.setattr("maverick_jax.convert.proof.verify.digest_file", lambda path: looked_at.append(path) or "")
    for place, value, content in random.Random(0).sample(readable, PICKED):
        file.write_text(content)
        for number, use in enumerate((verify, inspect, load, lambda m: export(m, tmp_path / "hf", progress=False))):
            with one_line((place, value, number)):
                use(model)
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
    assert all(path.resolve().is_relative_to(model) for path in looked_at)


def lose(*names: str):
    def change(manifest: dict[str, Any]) -> None:
        *parents, last = names
        for parent in parents:
            manifest = manifest[parent]
        del manifest[last]

    return change


MANIFESTS = {
    "a tensor too many": (lambda m: m["tensors"].update(extra=m["tensors"][NORM]), "params cannot be read (extra has no array)"),
    "a tensor too few": (lose("tensors", NORM), f"params cannot be read ({NORM} is in {MANIFEST} or there, and not in both)"),
    "a tensor of another shape": (lambda m: m["tensors"][NORM].update(shape=[161]), "zarr.json is damaged (manifest.json has another"),
    "a tensor of another dtype": (lambda m: m["tensors"][NORM].update(dtype="int8"), "zarr.json is damaged (manifest.json has another"),
    "a tensor that climbs out": (lambda m: m["tensors"].update({"../x": m["tensors"][NORM]}), "(the name '../x' is not what it should be)"),
    "a tensor without shape": (lose("tensors", NORM, "shape"), f"{MANIFEST} is damaged (tensors.{NORM} is not what it should be)"),
    "a tensor without source": (lose("tensors", NORM, "from"), f"{MANIFEST} is damaged (tensors.{NORM} is not what it should be)"),
    "a file that climbs out": (lambda m: m["files"].update({"../../x": ""}), "(the name '../../x' is not what it should be)"),
    "a file of the root": (lambda m: m["files"].update({"/dev/zero": ""}), "(the name '/dev/zero' is not what it should be)"),
    "a name that clears the screen": (lambda m: m["files"].update({"\x1b[2J": ""}), r"(the name '\x1b[2J' is not what it should be)"),
    "tensors as a list": (lambda m: m.update(tensors=[]), f"{MANIFEST} is damaged (tensors is not what it should be): convert"),
    "a text for a number": (lambda m: m["tensors"][NORM].update(shape=["160"]), f"(tensors.{NORM}.shape[0] is not what it should be)"),
    "no format": (lose("format"), "has format None, this version reads format 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_says_what_is_not_so_is_refused(model, case, refused):
    change, message = MANIFESTS[case]
    edit(model, change)
    with refused(message):
        open_model_directory(model)


def put(name: str, content: str | bytes):
    def change(model: Path) -> None:
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def replace_weights(content: bytes):
    """A file in the place of the folder."""

    def change(model: Path) -> None:
        shutil.rmtree(model / "params")
        (model / "params").write_bytes(content)

    return change


def pipe_for_weights(model: Path) -> None:
    shutil.rmtree(model / "params")
    os.mkfifo(model / "params")


def edit_array(**values):
    def change(model: Path) -> None:
        file = model / "params/state" / NORM / "zarr.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


NO_ADDRESS = "params is a file and holds no address gs://…: copy or convert the checkpoint again."
ARRAY = f"params/state/{NORM}/zarr.json"
FILES = {
    "no JSON for a manifest": (put(MANIFEST, "{"), f"{MANIFEST} is not valid JSON"),
    "a list for a manifest": (put(MANIFEST, "[]"), f"{MANIFEST} holds no JSON object: convert the checkpoint again."),
    "nested without end": (put(MANIFEST, "[" * 100_000), f"{MANIFEST} is not valid JSON"),
    "an empty file for weights": (replace_weights(b""), NO_ADDRESS),
    "a text for weights": (replace_weights(b"hello\n"), NO_ADDRESS),
    "bytes for weights": (replace_weights(bytes(range(256)) * 100), NO_ADDRESS),
    "another store": (replace_weights(b"http://example.com/model"), NO_ADDRESS),
    "a long address": (replace_weights(b"gs://" + b"x" * 1_000_000), NO_ADDRESS),
    "an address of two lines": (replace_weights(b"gs://bucket\ngs://other"), NO_ADDRESS),
    "a pipe for weights": (pipe_for_weights, "params/_CHECKPOINT_METADATA cannot be read (Not a directory)"),
    "no metadata": (lambda m: (m / "params/_CHECKPOINT_METADATA").unlink(), "_CHECKPOINT_METADATA cannot be read (No such file"),
    "metadata that is no JSON": (put("params/_CHECKPOINT_METADATA", "{"), "params/_CHECKPOINT_METADATA is not valid JSON"),
    "metadata of other types": (put("params/_CHECKPOINT_METADATA", '{"item_handlers": 7}'), "params cannot be read ("),
    "a tree that is no JSON": (put("params/state/_METADATA", b"\xff\xff"), "params/state/_METADATA is not valid JSON"),
    "a tree without leaves": (put("params/state/_METADATA", "{}"), "params cannot be read ("),
    "a tree of other types": (put("params/state/_METADATA", '{"tree_metadata": [1, {"a": null}]}'), "params cannot be read ("),
    "an array that is no JSON": (put(ARRAY, "x"), "zarr.json is not valid JSON"),
    "an array of nothing": (put(ARRAY, "{}"), "zarr.json is damaged (manifest.json has another shape or dtype)"),
    "an array of another shape": (edit_array(shape=[161]), "zarr.json is damaged (manifest.json has another shape or dtype)"),
    "an array of another format": (edit_array(zarr_format=2), "cannot be read ("),
    "an array of unknown chunks": (edit_array(chunk_grid={"name": "regular"}), "cannot be read ("),
    "an array of no chunks": (edit_array(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [0]}}), "cannot be read ("),
    "an array of another codec": (edit_array(codecs=[{"name": "gzip"}]), "cannot be read ("),
    "an array that is lost": (lambda m: (m / ARRAY).unlink(), f"params cannot be read ({NORM} has no array)"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file_is_refused(model, case, refused):
    change, message = FILES[case]
    change(model)
    with refused(message):
        open_model_directory(model).check_chunks()


def test_chunks_without_end_are_not_counted(model, refused):
    """A chunk per number of a large array: a stranger's file may say so, and the list of them would not fit."""
    directory = open_model_directory(model)
    shape = (10**12, 10**12)
    directory.parameters[NORM] = (shape, directory.parameters[NORM][1])

    class Array:
        class chunk_layout:
            class read_chunk:
                shape = (1, 1)

    directory._arrays[NORM] = Array()
    with refused(f"params/state/{NORM}/c/0/0, a part of {NORM}, is missing or cut short: copy or convert the checkpoint again."):
        directory.check_chunks()


def test_a_file_that_cannot_be_read_is_a_problem_of_its_own(model, monkeypatch):
    def denied(file: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("maverick_jax.convert.proof.verify.digest_file", denied)
    assert f"{model / 'config.json'} cannot be read: Permission denied." in verify(model, progress=False).problems
