"""Model directories as sources: made into other formats without the checkpoint, exported, and always held against their digests."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

from maverick_jax.checkpoint import load, save
from maverick_jax.convert import convert, export
from maverick_jax.convert.build.estimate import estimate
from maverick_jax.convert.build.model_source import open_model_source
from maverick_jax.convert.build.to_orbax import Conversion
from maverick_jax.convert.formats import places
from maverick_jax.convert.proof.verify import verify

GATE = "text.layers.1.feed_forward.experts.gate"
UP = "text.layers.1.feed_forward.experts.up"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}


def flip(file: Path, offset: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


@pytest.fixture
def model(maverick, tmp_path) -> Path:
    """A model directory to damage."""
    return shutil.copytree(maverick.converted, tmp_path / "model")


@pytest.mark.parametrize(
    ("target", "quantize"), [("int8", "experts,shared"), ("int4", ["experts", "dense"]), ("fp8", None), ("float32", None)]
)
def test_another_format_is_what_the_checkpoint_would_have_become(maverick, tmp_path, monkeypatch, target, quantize):
    """Byte for byte; with small chunks, which fall on other borders in another format."""
    monkeypatch.setattr(places, "BLOCK", 3 << 10)
    convert(maverick.source, tmp_path / "model")
    for source, out in ((maverick.source, "direct"), (tmp_path / "model", "again")):
        convert(source, tmp_path / out, target=target, quantize=quantize)
    direct, again = contents(tmp_path / "direct"), contents(tmp_path / "again")
    del direct["manifest.json"], again["manifest.json"]
    assert direct == again
    assert verify(tmp_path / "again", tmp_path / "model").problems == []
    assert verify(tmp_path / "again", maverick.source).problems == []


def test_back_to_plain_numbers(maverick, tmp_path):
    """What `export --format bfloat16` makes of quantized weights, as a model directory."""
    convert(maverick.source, tmp_path / "int8", target="int8")
    convert(tmp_path / "int8", tmp_path / "plain", target="bfloat16")
    export(tmp_path / "plain", tmp_path / "one")
    export(tmp_path / "int8", tmp_path / "other", target="bfloat16")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_the_manifest_says_where_it_comes_from(maverick, tmp_path):
    """The directory by its name and manifest, what that one came from, and so on; tensors by the digests of the directory."""
    convert(maverick.source, tmp_path / "first", target="int8")
    convert(tmp_path / "first", tmp_path / "second", target="int4")
    convert(tmp_path / "second", tmp_path / "third", target="float32")
    first, second, third = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("first", "second", "third"))
    assert list(second["source"]) == ["manifest.json"]
    assert second["before"] == {"directory": "first", **{key: first[key] for key in ("kind", "source", "target", "quantize")}}
    assert second["kind"] == "model directory of Hugging Face"
    assert third["before"]["before"] == second["before"]
    made_from = second["tensors"][f"{GATE}.values"]["from"]
    assert made_from == {f"manifest.json:{GATE}.{leaf}": first["tensors"][f"{GATE}.{leaf}"]["digest"] for leaf in ("values", "scales")}


def test_a_second_rounding_is_noted(maverick, tmp_path):
    convert(maverick.source, tmp_path / "int8", target="int8")
    assert estimate(maverick.source, tmp_path / "out", target="int4").notes == ()
    for found in (
        estimate(tmp_path / "int8", tmp_path / "int4", target="int4"),
        convert(tmp_path / "int8", tmp_path / "int4", target="int4"),
    ):
        assert "6 weights were quantized before: both errors add up" in found.notes[0]


def test_a_saved_model_is_a_source_too(maverick, tmp_path):
    """A fine-tune, whose arrays Orbax wrote."""
    save(load(maverick.converted), tmp_path / "saved")
    for source, out in ((maverick.source, "direct"), (tmp_path / "saved", "again")):
        convert(source, tmp_path / out, target="int8")
    direct, again = (contents(tmp_path / out / "params") for out in ("direct", "again"))
    assert direct == again
    assert verify(tmp_path / "again", tmp_path / "saved").problems == []


def test_a_resumed_conversion_ends_the_same(maverick, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        counter, do = itertools.count(), Conversion._do

        def stop(self, part):
            if next(counter) == 20:
                raise KeyboardInterrupt
            do(self, part)

        patch.setattr(Conversion, "_do", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(maverick.converted, tmp_path / "out", target="int8", workers=1)
    assert convert(maverick.converted, tmp_path / "out", target="int8").resumed > 0
    convert(maverick.converted, tmp_path / "whole", target="int8")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("make", "stored", "target"),
    [
        *((export, stored, target) for stored in (None, "fp8") for target in (None, "bfloat16", "float32")),
        *((make, "int4", "bfloat16") for make in (export, convert)),
        *((convert, stored, target) for stored in (None, "fp8") for target in ("float32", "int8")),
    ],
)
def test_a_flipped_byte_is_not_passed_on(maverick, tmp_path, refused, make, stored, target):
    """Nothing is left: neither the directory nor what was built of it."""
    convert(maverick.source, tmp_path / "model", target=stored)
    name = UP if stored is None else f"{UP}.values"
    flip(max((tmp_path / "model/params/state" / name / "c").rglob("*/0/0")))
    with refused(f"{name} is not what was written, ...params/state/{name} has changed: copy it again, or convert the checkpoint again."):
        make(tmp_path / "model", tmp_path / "out", target=target)
    assert sorted(os.listdir(tmp_path)) == ["model"]


@pytest.mark.parametrize("offset", [0, 77, -1])
def test_every_byte_counts(model, tmp_path, refused, offset):
    """In the smallest parameter as in the largest, with blocks that are parts of chunks."""
    for name in ("text.norm", GATE, "text.embedding"):
        file = next(file for file in (model / "params/state" / name / "c").rglob("*") if file.is_file())
        flip(file, offset)
        with refused(f"{name} is not what was written"):
            export(model, tmp_path / "out")
        flip(file, offset)
    export(model, tmp_path / "out")


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "state/_METADATA", f"state/{GATE}/zarr.json"])
def test_descriptions_are_looked_at_before_anything_is_written(model, tmp_path, refused, name):
    with (model / "params" / name).open("a") as stream:
        stream.write(" ")
    for make, target in ((export, None), (convert, "int8")):
        with refused(f"params/{name} is missing, or not what was written"):
            make(model, tmp_path / "out", target=target)
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_a_saved_model_is_looked_at_too(maverick, tmp_path, refused):
    save(load(maverick.converted), tmp_path / "model")
    flip(next(file for file in (tmp_path / "model/params/state" / GATE / "c").rglob("*") if file.is_file()))
    with refused("is missing, or not what was written: copy it again"):
        export(tmp_path / "model", tmp_path / "out")


def test_a_chunk_that_is_gone_is_named_first(model, tmp_path, refused):
    next((model / "params/state/text.norm/c").iterdir()).unlink()
    for make, target in ((export, None), (convert, "int8")):
        with refused("a part of text.norm, is missing or cut short"):
            make(model, tmp_path / "out", target=target)
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_without_digests_nothing_can_be_checked_and_that_is_said(maverick, tmp_path):
    convert(maverick.source, tmp_path / "model", digests=False)
    flip(next((tmp_path / "model/params/state/text.norm/c").iterdir()))
    note = f"{tmp_path / 'model'} was made without digests: its weights were read unchecked."
    assert convert(tmp_path / "model", tmp_path / "int8", target="int8").notes == (note,)
    assert open_model_source(tmp_path / "model").notes == (note,)
    assert verify(tmp_path / "int8", tmp_path / "model").problems == []
    export(tmp_path / "model", tmp_path / "out")


def test_a_repaired_directory_does_not_go_on_with_what_was_wrong(model, tmp_path, refused):
    """What was made of the damaged bytes is gone, or it would be taken for done."""
    file = max((model / "params/state" / UP / "c").rglob("*/0/0"))
    flip(file)
    with refused("is not what was written"):
        convert(model, tmp_path / "out", target="int8")
    flip(file)
    assert convert(model, tmp_path / "out", target="int8").resumed == 0
    assert verify(tmp_path / "out", model).problems == []


def test_what_an_earlier_attempt_read_is_held_against_its_digest_too(maverick, tmp_path, monkeypatch, refused):
    """It was stopped within a tensor, behind the damaged chunk, which the next one need not read."""
    monkeypatch.setattr(places, "BLOCK", 3 << 10)
    convert(maverick.source, tmp_path / "model")
    flip(min((tmp_path / "model/params/state/text.embedding/c").rglob("*/0")))
    with monkeypatch.context() as patch:
        do = Conversion._do

        def stop(self, part):
            if part.step.weight == "text.embedding" and part.number == 8:
                raise KeyboardInterrupt
            do(self, part)

        patch.setattr(Conversion, "_do", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "model", tmp_path / "out", target="float32", workers=1)
    with refused("text.embedding is not what was written"):
        convert(tmp_path / "model", tmp_path / "out", target="float32")
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_as_it_is_a_model_directory_needs_no_converting(maverick, tmp_path, refused):
    with refused("converted is a model directory, converted already: use it as it is, name another --format"):
        convert(maverick.converted, tmp_path / "out")
