"""Whatever changes after a conversion, on either side, is found and named."""

import json
import shutil
from pathlib import Path

import pytest

from maverick_jax.checkpoint import load, save
from maverick_jax.convert import convert
from maverick_jax.convert.formats import safetensors
from maverick_jax.convert.proof.verify import verify
from maverick_jax.errors import UserError

GATE_UP = "language_model.model.layers.1.feed_forward.experts.gate_up_proj"
GATE = "text.layers.1.feed_forward.experts.gate"
UP = "text.layers.1.feed_forward.experts.up"


@pytest.fixture
def copy(maverick, tmp_path) -> Path:
    """A model directory and its checkpoint, to damage."""
    shutil.copytree(maverick.source, tmp_path / "source")
    return shutil.copytree(maverick.converted, tmp_path / "model")


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def flip_tensor(directory: Path, name: str, offset: int) -> Path:
    """A byte of a tensor in a safetensors file."""
    for file in directory.glob("*.safetensors"):
        if name in (tensors := safetensors.read_header(file)):
            flip(file, tensors[name].offset + offset)
            return file
    raise AssertionError(name)


def test_nothing_is_found_where_nothing_is_wrong(case):
    report = verify(case.converted, case.source, progress=False)
    assert report.problems == []
    manifest = json.loads((case.converted / "manifest.json").read_text())
    assert report.tensors == report.rederived == len(manifest["tensors"])
    assert report.bytes == manifest["bytes"]


def test_a_flipped_byte_in_a_chunk_is_named(copy):
    file = next((copy / "params/state" / UP / "c").rglob("*/0/0"))
    flip(file, 5)
    assert [problem for problem in verify(copy, progress=False).problems if UP in problem and "has changed" in problem]


def test_a_lost_chunk_is_named(copy):
    file = next((copy / "params/state/text.norm/c").iterdir())
    file.unlink()
    assert verify(copy, progress=False).problems == [f"text.norm is not what was written: {file} is missing."]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "params/_CHECKPOINT_METADATA", "params/state/text.norm/zarr.json"])
def test_every_other_file_is_looked_at(copy, name):
    file = copy / name
    file.write_text(file.read_text() + " ")
    assert verify(copy, progress=False).problems == [f"{file} is not what was written."]
    file.unlink()
    assert f"{file} is missing." in verify(copy, progress=False).problems


def test_a_changed_manifest_is_refused(copy):
    """It could otherwise be made to agree with what is there."""
    file = copy / "manifest.json"
    file.write_text(file.read_text().replace('"Hugging Face"', '"Hugging face"'))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        verify(copy, progress=False)


def test_a_flipped_byte_in_the_source_is_named(copy):
    """After the conversion: the result is what it was, and the file and the tensor that changed are named."""
    source = copy.parent / "source"
    file = flip_tensor(source, GATE_UP, 96 * 2 + 1)  # the first weight of up, behind a row of gate
    assert verify(copy, progress=False).problems == []
    problems = verify(copy, source, progress=False).problems
    assert problems == [f"{UP} is not what {source} makes of it.", f"{file} has changed since it was converted: {GATE_UP}."]


def test_a_changed_header_of_the_source_is_named(copy):
    """Tensors are the same, the file is not."""
    source = copy.parent / "source"
    file = min(source.glob("*.safetensors"))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes((length + 8).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 8 + content[8 + length :])
    assert verify(copy, source, progress=False).problems == [f"{file} has changed since it was converted: its header."]


def test_both_sides_are_compared_without_digests_too(maverick, tmp_path):
    convert(maverick.source, tmp_path / "model", digests=False, progress=False)
    with pytest.raises(UserError, match="was made without digests: compare it with its checkpoint, --against SRC"):
        verify(tmp_path / "model", progress=False)
    assert verify(tmp_path / "model", maverick.source, progress=False).problems == []
    flip(next((tmp_path / "model/params/state" / GATE / "c").rglob("*/0/0")), 0)
    assert verify(tmp_path / "model", maverick.source, progress=False).problems == [f"{GATE} is not what {maverick.source} makes of it."]


def test_quantized_weights_are_made_again(maverick, tmp_path):
    """The manifest remembers what was asked for."""
    convert(maverick.source, tmp_path / "model", target="int4", quantize=("experts", "shared"), progress=False)
    assert verify(tmp_path / "model", maverick.source, progress=False).problems == []
    flip(next((tmp_path / "model/params/state" / f"{GATE}.scales" / "c").rglob("*/0/0")), 0)
    problems = verify(tmp_path / "model", maverick.source, progress=False).problems
    assert [problem.split(" is not")[0] for problem in problems] == [f"{GATE}.scales"] * 2


def test_another_model_is_no_source(maverick, cases):
    with pytest.raises(UserError, match=r"is not the checkpoint that .* was made from"):
        verify(maverick.converted, cases["scout"].source, progress=False)


def test_a_flipped_byte_of_a_saved_model_is_found(maverick, tmp_path):
    """A fine-tuned model has no checkpoint to be compared with: its chunks are files like others."""
    directory = save(load(maverick.converted), tmp_path / "saved")
    assert verify(directory, progress=False).problems == []
    file = max((file for file in (directory / "params").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    flip(file, 9)
    assert verify(directory, progress=False).problems == [f"{file} is not what was written."]


def test_products_that_are_rounded_are_not_called_exact(maverick, tmp_path):
    """Or hidden states that differ by the rounding would be taken for a fault."""
    for target, exact in ((None, True), ("float32", True), ("int8", False)):
        convert(maverick.source, tmp_path / str(target), target=target, progress=False)
        assert verify(tmp_path / str(target), progress=False).exact is exact
