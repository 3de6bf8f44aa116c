"""Conversion: Orbax reads what we made, an interruption costs nothing, memory does not grow."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import xxhash
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from safetensors.torch import load_file

from maverick_jax.config import Config, TextConfig
from maverick_jax.convert import Source, convert, open_model_directory
from maverick_jax.convert.build.orbax import flatten, unflatten
from maverick_jax.convert.build.writer import Leaf, Writer, array_spec
from maverick_jax.convert.formats import names, places, safetensors
from maverick_jax.convert.formats.shards import INDEX
from maverick_jax.errors import UserError
from oracle.port import convert as expected_parameter

ROOT = Path(__file__).parents[3]


def test_orbax_alone_reads_the_weights(case):
    loaded = flatten(ocp.load(case.converted / "params"))
    tensors = case.tensors
    assert len(loaded) == len(names.find_places(Config.from_directory(case.converted)))
    for name, values in loaded.items():
        assert values.dtype == "bfloat16"
        np.testing.assert_array_equal(np.asarray(values, np.float32), expected_parameter(name, values.shape, tensors), err_msg=name)


def test_orbax_alone_reads_them_sharded(maverick):
    """Experts over eight devices, another parameter over a middle axis that cuts across chunks."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    experts, query = "text.layers.1.feed_forward.experts.up", "text.layers.0.feed_forward.down"
    specs = {experts: PartitionSpec("x"), query: PartitionSpec(None, "x")}
    described = flatten(ocp.metadata(maverick.converted / "params").metadata)
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=NamedSharding(mesh, specs.get(name, PartitionSpec())))
        for name, leaf in described.items()
    }
    loaded = flatten(ocp.load(maverick.converted / "params", unflatten(abstract)))
    tensors = maverick.tensors
    for name, values in loaded.items():
        np.testing.assert_array_equal(np.asarray(values, np.float32), expected_parameter(name, values.shape, tensors), err_msg=name)
    assert loaded[experts].addressable_shards[3].data.shape == (1, 160, 96)
    assert loaded[query].addressable_shards[3].data.shape == (192, 20)


def test_orbax_knows_the_real_shapes(case):
    described = flatten(ocp.metadata(case.converted / "params").metadata)
    found = names.find_places(Config.from_directory(case.source))
    assert {name: tuple(leaf.shape) for name, leaf in described.items()} == {name: place.shape for name, (_, place) in found.items()}


def test_the_directory_holds_what_a_model_needs_and_nothing_else(maverick):
    files = {"config.json", "generation_config.json", "manifest.json", "params", "tokenizer.json", "chat_template.jinja", "USE_POLICY.md"}
    assert {file.name for file in maverick.converted.iterdir()} == files
    assert not list(maverick.converted.parent.glob("*.partial"))
    manifest = json.loads((maverick.converted / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["parameters"] == sum(tensor.size for tensor in maverick.tensors.values())
    assert manifest["bytes"] == 2 * manifest["parameters"]
    assert (manifest["kind"], manifest.get("target")) == ("Hugging Face", None)
    assert manifest["source"] == {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in maverick.source.glob("*.safetensors")
    }


def test_the_manifest_says_what_every_tensor_was_made_from(case):
    """Digests of the stored tensors, by another reader of safetensors."""
    manifest = json.loads((case.converted / "manifest.json").read_text())
    index = json.loads((case.source / INDEX).read_text())["weight_map"]
    expected = {}
    for file in case.source.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            expected[f"{file.name}:{name}"] = xxhash.xxh3_128_hexdigest(tensor.view(torch.uint8).numpy().tobytes())
    found = names.find_places(Config.from_directory(case.source))
    assert list(manifest["tensors"]) == list(found)
    for name, (stored, place) in found.items():
        entry, key = manifest["tensors"][name], f"{index[stored]}:{stored}"
        assert (tuple(entry["shape"]), entry["dtype"], entry["transform"]) == (place.shape, "bfloat16", "copy")
        assert entry["from"] == {key: expected[key]}


@pytest.mark.parametrize("digests", [True, False])
def test_the_summary_counts_all_that_was_done(maverick, tmp_path, digests):
    """People judge by it whether a conversion did what they wanted."""
    summary = convert(maverick.source, tmp_path / "out", digests=digests, progress=False)
    count = sum(tensor.size for tensor in maverick.tensors.values())
    assert (summary.kind, summary.parameters, summary.tensors) == (
        "Hugging Face",
        count,
        len(maverick.tensors) + 2,
    )  # gate|up in two layers
    assert (summary.bytes_read, summary.bytes_written, summary.resumed, summary.not_finite) == (2 * count, 2 * count, 0, [])


def test_without_digests_the_weights_are_the_same(maverick, tmp_path):
    convert(maverick.source, tmp_path / "out", digests=False, progress=False)
    _assert_same_params(tmp_path / "out", maverick.converted)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert not any("digest" in entry for entry in manifest["tensors"].values())


def test_chunks_of_zeros_are_kept(tmp_path):
    """Zarr may leave chunks of its fill value out; then they would look missing, and be written again at each resumption."""
    import tensorstore

    writer = Writer(tmp_path / "params", {"zeros": Leaf((4, 3), np.dtype(np.float32), (2, 2))})
    for index in places.chunk_indices((4, 3), (2, 2)):
        writer.write("zeros", index, np.zeros([part.stop - part.start for part in index], np.float32))
    files = [file for file in (tmp_path / "params/state/zeros/c").rglob("*") if file.is_file()]
    assert [file.stat().st_size for file in files] == [16] * 4
    array = tensorstore.open(array_spec(tmp_path / "params", "zeros"), open=True).result()
    np.testing.assert_array_equal(array.read().result(), np.zeros((4, 3), np.float32))


@pytest.fixture
def small_blocks(monkeypatch):
    """Many chunks per tensor, even in a tiny model."""
    monkeypatch.setattr(places, "BLOCK", 1 << 14)


@pytest.fixture
def written(monkeypatch) -> list[tuple]:
    """What the writer is given, in order."""
    calls: list[tuple] = []
    write = Writer.write
    monkeypatch.setattr(Writer, "write", lambda self, *args: calls.append(args[:2]) or write(self, *args))
    return calls


def test_an_interrupted_conversion_goes_on(maverick, tmp_path, small_blocks, written, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", _fails_after(100))
        with pytest.raises(KeyboardInterrupt):
            convert(maverick.source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    begun = len(written)
    convert(maverick.source, tmp_path / "out", progress=False)
    _assert_same_params(tmp_path / "out", maverick.converted)
    assert begun == 100
    assert len(set(map(str, written))) == len(written)  # nothing is written twice


def _fails_after(count: int):
    read, calls = Source.read, []

    def interrupted(self, name, index):
        calls.append(name)
        if len(calls) > count:
            raise KeyboardInterrupt
        return read(self, name, index)

    return interrupted


@pytest.mark.parametrize("left", ["skeleton.orbax-checkpoint-tmp", "skeleton", "params"])
def test_a_skeleton_that_was_cut_short_is_made_again(maverick, tmp_path, monkeypatch, left):
    """Killed inside Orbax's own save, before it has its name, or between that and the first chunk."""
    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", _fails_after(0))
        with pytest.raises(KeyboardInterrupt):
            convert(maverick.source, tmp_path / "out", progress=False)
    partial = tmp_path / "out.partial"
    shutil.rmtree(partial / "params/state/text.norm")
    (partial / "params").rename(partial / left)
    convert(maverick.source, tmp_path / "out", progress=False)
    _assert_same_params(tmp_path / "out", maverick.converted)
    assert not list((tmp_path / "out").glob("skeleton*"))


def _assert_same_params(directory: Path, other: Path) -> None:
    ours, theirs = open_model_directory(directory), open_model_directory(other)
    assert ours.parameters == theirs.parameters
    for name in ours.parameters:
        np.testing.assert_array_equal(ours.read(name, ...), theirs.read(name, ...), err_msg=name)


def test_a_partial_directory_of_another_checkpoint_is_refused(maverick, tmp_path, monkeypatch):
    """Two fine-tunes have the same names, shapes and sizes: mixing them would go unnoticed."""
    source = shutil.copytree(maverick.source, tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", _fails_after(3))
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", progress=False)
    os.utime(next(source.glob("*.safetensors")))
    with pytest.raises(
        UserError, match=r"out\.partial was begun from another checkpoint or with other options, or the checkpoint has changed since"
    ):
        convert(source, tmp_path / "out", progress=False)


MEASURED = """
import pathlib, re, sys, time
from maverick_jax.convert import convert
begin = time.monotonic()
convert(sys.argv[1], sys.argv[2], progress=False)
seconds = time.monotonic() - begin
# not ru_maxrss: a child inherits its parent's peak through exec
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
print(peak, seconds)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_model():
    """2 GB in at most 600 MB, of which the imports are 180."""
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path: pytest would keep 4 GB
        if shutil.disk_usage(folder).free < 6e9:
            pytest.skip("needs 6 GB of disk")
        source, out = Path(folder, "source"), Path(folder, "out")
        noise = _write_random_checkpoint(source)
        run = subprocess.run([sys.executable, "-c", MEASURED, source, out], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        peak, seconds = map(float, run.stdout.split())
        size = sum(file.stat().st_size for file in source.iterdir())
        print(f"{size / 1e9:.2f} GB: peak {peak / 1e6:.0f} MB, {size / 1e6 / seconds:.0f} MB/s")
        assert size > 1.9e9
        assert peak <= 600e6
        down = open_model_directory(out).read("text.layers.1.feed_forward.experts.down", (slice(63, 64), slice(None), slice(None)))
        assert down.tobytes() in noise * 2


def _write_random_checkpoint(directory: Path) -> bytes:
    """2 GB, most of it 64 experts, from one block of noise repeated."""
    text = TextConfig(
        vocab_size=65536,
        hidden_size=1024,
        intermediate_size=4096,
        intermediate_size_mlp=8192,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        num_local_experts=64,
        moe_layers=(1,),
        nope_layers=(),
    )
    config = Config(text=text)
    found = names.find_places(config).values()
    header = safetensors.make_header({stored: (place.stored_shape, np.dtype(jnp.bfloat16)) for stored, place in found})
    left = sum(np.prod(place.shape) * 2 for _, place in found)
    noise = np.random.default_rng(0).bytes(1 << 24)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_huggingface()))
    with open(directory / "model.safetensors", "wb") as file:
        file.write(header)
        while left > 0:
            file.write(noise[:left])
            left -= len(noise)
    return noise


def test_a_config_without_a_dtype_learns_what_the_weights_became(maverick, tmp_path):
    """It would be loaded in bfloat16, whatever was asked for."""
    source = shutil.copytree(maverick.source, tmp_path / "source")
    values = json.loads((source / "config.json").read_text())
    for part in (values, values["text_config"], values["vision_config"]):
        for name in ("dtype", "torch_dtype"):
            part.pop(name, None)
    (source / "config.json").write_text(json.dumps(values))
    convert(source, tmp_path / "out", target="float32", progress=False)
    assert Config.from_directory(tmp_path / "out").dtype == "float32"
