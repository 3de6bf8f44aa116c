"""What users get wrong: one line that names the file and the cure, and nothing half-made that looks whole."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from maverick_jax.config import Config
from maverick_jax.convert import convert, export, inspect, open_model_directory
from maverick_jax.convert.build import to_pytorch
from maverick_jax.convert.build.estimate import estimate
from maverick_jax.convert.build.writer import Writer
from maverick_jax.convert.formats import safetensors
from maverick_jax.convert.formats.shards import INDEX
from maverick_jax.convert.proof.verify import verify

Q_PROJ = "language_model.model.layers.3.self_attn.q_proj.weight"


@pytest.fixture
def source(maverick, tmp_path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(maverick.source, tmp_path / "source")


def shard_of(source: Path, name: str) -> Path:
    return source / json.loads((source / INDEX).read_text())["weight_map"][name]


def rewrite(file: Path, change) -> None:
    """Save a shard again after `change(tensors)`."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_header(file: Path, change) -> None:
    """Rewrite a shard's header after `change(entries)`, and leave its bytes alone."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    change(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def edit(file: Path, change) -> None:
    """Save a JSON file again after `change(values)`."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def truncate(source):
    file = shard_of(source, Q_PROJ)
    os.truncate(file, file.stat().st_size - 100)


def misshape(source):
    rewrite(shard_of(source, Q_PROJ), lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ][:, 1:].contiguous()}))


def lose_tensor(source):
    rewrite(shard_of(source, Q_PROJ), lambda tensors: tensors.pop(Q_PROJ))
    edit(source / INDEX, lambda values: values["weight_map"].pop(Q_PROJ))


def add_tensor(source):
    file = shard_of(source, Q_PROJ)
    rewrite(file, lambda tensors: tensors.update(extra=tensors[Q_PROJ].clone()))
    edit(source / INDEX, lambda values: values["weight_map"].update(extra=file.name))


def swap_home(source):
    other = next(f.name for f in source.glob("*.safetensors") if f != shard_of(source, Q_PROJ))
    edit(source / INDEX, lambda values: values["weight_map"].update({Q_PROJ: other}))


def climb_out(source):
    edit(source / INDEX, lambda values: values["weight_map"].update({Q_PROJ: "../model.safetensors"}))


def quantize_otherwise(source):
    edit(source / "config.json", lambda values: values.update(quantization_config={"quant_method": "fbgemm_fp8"}))


def lose_weights(source):
    for file in source.glob("model*"):
        file.unlink()


def put_in_two_shards(source):
    home = shard_of(source, Q_PROJ)
    other = max(file for file in source.glob("*.safetensors") if file != home)
    weight = load_file(home)[Q_PROJ]
    rewrite(other, lambda tensors: tensors.update({Q_PROJ: weight}))


def lie_about_offsets(source):
    def change(header):
        header[Q_PROJ]["data_offsets"] = [begin + 64 for begin in header[Q_PROJ]["data_offsets"]]

    edit_header(shard_of(source, Q_PROJ), change)


def claim_an_exabyte(source):
    def change(header):
        begin = header[Q_PROJ]["data_offsets"][0]
        header[Q_PROJ] |= {"shape": [10**9, 10**9], "data_offsets": [begin, begin + 2 * 10**18]}

    edit_header(shard_of(source, Q_PROJ), change)


def link_to_itself(file):
    file.unlink(missing_ok=True)
    file.symlink_to(file.name)


def turn_in_a_circle(source):
    shutil.rmtree(source)
    source.symlink_to("circle")
    source.with_name("circle").symlink_to("source")


DAMAGED = {
    "missing shard": (lambda s: shard_of(s, Q_PROJ).unlink(), f"{INDEX} names model-...safetensors, which is not there: fetch"),
    "truncated shard": (truncate, ".safetensors ends 100 bytes before `...` does: the download is incomplete; fetch this file again."),
    "wrong shape": (misshape, f".safetensors: {Q_PROJ} has shape [160, 159], the model's config asks for [160, 160]."),
    "missing tensor": (lose_tensor, f"source lacks {Q_PROJ}: config and weights belong to different models"),
    "unexpected tensor": (add_tensor, "source has the unexpected extra: config and weights belong to different models"),
    "tensor in another shard": (swap_home, f".safetensors ... {INDEX} ...: fetch both again."),
    "index that climbs out": (climb_out, f"{INDEX} has no weight_map from tensors to files beside it"),
    "index without a map": (lambda s: (s / INDEX).write_text("{}"), f"{INDEX} has no weight_map"),
    "index that is no JSON": (
        lambda s: (s / INDEX).write_text("<html>"),
        f"{INDEX} is a page of HTML, as a server sends where a login is missing: fetch it again, logged in",
    ),
    "unknown quantization": (quantize_otherwise, "config.json: quant_method 'fbgemm_fp8' is not supported"),
    "no weights": (lose_weights, f"source is not a Hugging Face checkpoint: it has neither model.safetensors nor {INDEX}"),
    "no config": (lambda s: (s / "config.json").unlink(), "source is not a checkpoint: it has neither config.json nor params.json"),
    "tensor in two shards": (put_in_two_shards, f"{Q_PROJ} is in model-... and in ...safetensors: fetch both again."),
    "offsets that lie": (lie_about_offsets, f".safetensors has a damaged header ({Q_PROJ} does not begin where ... ends): fetch it again."),
    "a tensor of an exabyte": (claim_an_exabyte, ".safetensors has a damaged header (... does not begin where ... ends): fetch it again."),
    "a shard that links to itself": (
        lambda s: link_to_itself(shard_of(s, Q_PROJ)),
        "source has model-...safetensors, which cannot be read (Too many levels of symbolic links): fetch it again",
    ),
    "a config that links to itself": (
        lambda s: link_to_itself(s / "config.json"),
        "source has config.json, which cannot be read (Too many levels of symbolic links): fetch it again",
    ),
    "links in a circle": (turn_in_a_circle, "source is a link that leads nowhere or in a circle: give the directory itself."),
    "nothing at all": (shutil.rmtree, "source does not exist"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_checkpoint_is_refused_before_anything_is_made(source, tmp_path, damage, refused):
    change, message = DAMAGED[damage]
    change(source)
    with refused(message):
        convert(source, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_a_destination_that_exists_is_kept(maverick, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("precious")
    for make, directory in ((convert, maverick.source), (export, maverick.converted)):
        with refused("out exists: choose another destination, or remove it first."):
            make(directory, tmp_path / "out", progress=False)
    assert (tmp_path / "out/thesis.tex").read_text() == "precious"


def test_a_destination_that_cannot_be_made_is_named(maverick, tmp_path, refused):
    (tmp_path / "file").touch()
    with refused("file/out cannot be made, for ...file is no directory: choose another destination."):
        convert(maverick.source, tmp_path / "file/out", progress=False)


def test_a_destination_that_may_not_be_written_is_named(maverick, tmp_path, monkeypatch, refused):
    """A read-only disk; not tried with permissions, which do not bind the root user."""

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    for make, directory in ((convert, maverick.source), (export, maverick.converted)):
        with refused("out.partial cannot be made (Read-only file system): choose another destination."):
            make(directory, tmp_path / "out", progress=False)


def test_a_destination_behind_links_in_a_circle_is_named(maverick, tmp_path, refused):
    (tmp_path / "circle").symlink_to("circle")
    with refused("circle/out cannot be made, for ...circle is no directory: choose another destination."):
        convert(maverick.source, tmp_path / "circle/out", progress=False)
    with refused("circle exists: choose another destination"):
        convert(maverick.source, tmp_path / "circle", progress=False)


def test_a_partial_directory_that_is_not_ours_is_kept(maverick, tmp_path, refused):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.tex").write_text("precious")
    with refused("out.partial was begun from another checkpoint...remove it"):
        convert(maverick.source, tmp_path / "out", progress=False)
    assert (tmp_path / "out.partial/thesis.tex").exists()


def test_space_is_checked_beforehand(maverick, tmp_path, monkeypatch, refused):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for make, directory in ((convert, maverick.source), (export, maverick.converted)):
        with refused(f"1,000 bytes free, {inspect(directory).bytes:,} are needed: free some"):
            make(directory, tmp_path / make.__name__, progress=False)
        assert not (tmp_path / make.__name__).exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Failed to write 34816 bytes to file 4: No space left on device [os_error_code='28']"),
    ],
    ids=["ours", "TensorStore's"],
)
def test_a_disk_that_fills_up_leaves_an_unfinished_directory(maverick, tmp_path, monkeypatch, error, refused):
    def full(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", full)
        with refused("no space left on the disk of ...out: free some, then run this again"):
            convert(maverick.source, tmp_path / "out", progress=False)
    partial = tmp_path / "out.partial"
    assert not (tmp_path / "out").exists()
    with refused("out.partial is not a checkpoint"):  # so `load` refuses it, too
        Config.from_directory(partial)
    for use in (open_model_directory, inspect, lambda p: export(p, tmp_path / "hf", progress=False)):
        with refused("out.partial is not a finished model directory: it has no manifest.json"):
            use(partial)
    convert(maverick.source, tmp_path / "out", progress=False)
    assert open_model_directory(tmp_path / "out").parameters


def test_two_converters_do_not_share_a_destination(maverick, tmp_path, refused):
    (tmp_path / "out.partial").mkdir()
    other = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    for make, directory in ((convert, maverick.source), (export, maverick.converted)):
        with refused("another process is writing ...out.partial: wait for it to end."):
            make(directory, tmp_path / "out", progress=False)
    os.close(other)
    convert(maverick.source, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "manifest,message", [("{", "manifest.json is not valid JSON"), ('{"format": 99}', "has format 99, this version reads")]
)
def test_a_manifest_from_elsewhere_is_refused(maverick, tmp_path, manifest, message, refused):
    directory = shutil.copytree(maverick.converted, tmp_path / "model")
    (directory / "manifest.json").write_text(manifest)
    with refused(message):
        open_model_directory(directory)


def test_export_of_a_hugging_face_directory_is_refused(maverick, tmp_path, refused):
    with refused("source is a checkpoint of PyTorch, and no model directory: `maverick convert` makes one of it."):
        export(maverick.source, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_an_unreadable_file_is_named(source, monkeypatch, refused):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(safetensors, "open", denied, raising=False)
    with refused("model.safetensors cannot be read: Permission denied."):
        safetensors.read_header(source / "model.safetensors")


def test_what_may_not_be_read_is_named(maverick, tmp_path, monkeypatch, refused):
    """By every command; asked of the system, for permissions do not bind the root user."""
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.R_OK)
    for call, directory in (
        (lambda d: convert(d, tmp_path / "out"), maverick.source),
        (inspect, maverick.source),
        (inspect, maverick.converted),
        (lambda d: export(d, tmp_path / "out"), maverick.converted),
        (verify, maverick.converted),
        (open_model_directory, maverick.converted),
    ):
        with refused(f"{directory} cannot be read (Permission denied): give yourself the right to."):
            call(directory)
    assert not list(tmp_path.glob("out*"))


def test_a_destination_in_a_folder_that_may_not_be_written_is_named(maverick, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    for make, directory in ((convert, maverick.source), (estimate, maverick.source), (export, maverick.converted)):
        with refused("out cannot be made, for you may not write into"):
            make(directory, tmp_path / "new/out")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_no_empty_directories(maverick, tmp_path, monkeypatch, refused):
    """Those above the result included; what an export has written is no use to the next."""
    with monkeypatch.context() as patch:
        patch.setattr(to_pytorch, "_blocks", lambda *_: [][0])
        with pytest.raises(IndexError):
            export(maverick.converted, tmp_path / "new/deep/out")
    assert not list(tmp_path.iterdir())


TEXT = {"model_type": "llama4_text", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
NOT_A_MODEL = {
    "nested without end": "[" * 100_000,
    "a word for a number": json.dumps(TEXT | {"vocab_size": "abc"}),
    "no heads": json.dumps(TEXT | {"num_attention_heads": 0, "head_dim": None}),
}


@pytest.mark.parametrize("content", NOT_A_MODEL)
def test_a_config_that_no_model_has_is_refused(source, tmp_path, content, refused):
    """One line, whatever a file holds."""
    (source / "config.json").write_text(NOT_A_MODEL[content])
    with refused("config.json"):
        convert(source, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_a_name_that_no_file_system_takes_is_refused(tmp_path, refused):
    with refused("cannot be opened"):
        convert("x" * 300, tmp_path / "out", progress=False)
