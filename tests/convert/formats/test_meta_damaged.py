"""What may be wrong with Meta's `.pth` files: code in them, ranks that are missing, and all that breaks on the way."""

import io
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from maverick_jax.convert import convert


@pytest.fixture
def source(two_ranks, tmp_path) -> Path:
    """A checkpoint of two ranks to damage."""
    return shutil.copytree(two_ranks, tmp_path / "source")


class Malicious:
    """A pickle that runs a command when it is read."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_code_in_a_pickle_is_not_run(source, tmp_path, refused):
    """Whoever fetches weights must not fetch a program."""
    witness, file = tmp_path / "ran", source / "consolidated.01.pth"
    with torch.serialization.safe_globals([io.BytesIO]):
        entries = torch.load(file)
    torch.save(entries | {"layers.0.attention.extra": Malicious(f"touch {witness}")}, file)
    with refused("consolidated.01.pth holds more than tensors, none of which was run (... posix.system ...): fetch the released file."):
        convert(source, tmp_path / "out", progress=False)
    assert not witness.exists()
    torch.load(file, weights_only=False)  # so the trap is one
    assert witness.exists()


def edit_rank(file: Path, change) -> None:
    with torch.serialization.safe_globals([io.BytesIO]):
        entries = torch.load(file)
    change(entries)
    torch.save(entries, file)


def edit_params(source: Path, **values) -> None:
    file = source / "params.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def four_ranks(source: Path) -> None:
    """Two more files that are whole, so that only numbers and widths are wrong."""
    for rank in (2, 3):
        shutil.copyfile(source / f"consolidated.0{rank - 2}.pth", source / f"consolidated.0{rank}.pth")


def flip_type(source: Path) -> None:
    edit_rank(source / "consolidated.01.pth", lambda e: e.update({"output.weight": e["output.weight"].float()}))


def transpose(source: Path) -> None:
    edit_rank(source / "consolidated.00.pth", lambda e: e.update({"output.weight": e["output.weight"].T}))


def repack(file: Path, method: int, changed: dict[str, bytes]) -> None:
    """Write the archive again, as a tool for archives would."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()} | changed
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)


def compress(file: Path) -> None:
    repack(file, zipfile.ZIP_DEFLATED, {})


def edit_record(file: Path, name: str, content: bytes) -> None:
    repack(file, zipfile.ZIP_STORED, {f"{file.stem}/{name}": content})


def leave(pattern: str):
    """Remove all weights; leave a file of that name."""

    def change(source: Path) -> None:
        for file in source.glob("*.pth"):
            file.rename(source / pattern) if file.name.startswith("consolidated.00") else file.unlink()

    return change


DAMAGED = {
    "the first rank is missing": (
        lambda s: (s / "consolidated.00.pth").unlink(),
        "source lacks the file of rank 0 (consolidated.*.pth): fetch it too.",
    ),
    "the last rank is missing": (lambda s: (s / "consolidated.01.pth").unlink(), "the model's config asks for"),
    "a hole in the ranks": (
        lambda s: (s / "consolidated.01.pth").rename(s / "consolidated.03.pth"),
        "source lacks the file of rank 1 (consolidated.*.pth): fetch it too.",
    ),
    "too many ranks": (four_ranks, "the model's config asks for"),
    "truncated": (
        lambda s: os.truncate(s / "consolidated.01.pth", (s / "consolidated.01.pth").stat().st_size - 100),
        "consolidated.01.pth ends before its table of contents does: the download is incomplete; fetch this file again.",
    ),
    "half of it": (
        lambda s: os.truncate(s / "consolidated.01.pth", (s / "consolidated.01.pth").stat().st_size // 2),
        "consolidated.01.pth ends before its table of contents does: the download is incomplete; fetch this file again.",
    ),
    "compressed by a tool": (
        lambda s: compress(s / "consolidated.01.pth"),
        "consolidated.01.pth: consolidated.01/... is compressed, which torch.save never does: fetch the released file",
    ),
    "written on a machine of another byte order": (
        lambda s: edit_record(s / "consolidated.01.pth", "byteorder", b"big"),
        "consolidated.01.pth has bytes in b'big' order: load it where it was saved",
    ),
    "empty": (lambda s: os.truncate(s / "consolidated.01.pth", 0), "consolidated.01.pth is empty, for a download did not begin"),
    "a web page": (lambda s: (s / "consolidated.01.pth").write_text("<!DOCTYPE html>"), "consolidated.01.pth ...: fetch "),
    "a link to itself": (
        lambda s: ((s / "consolidated.01.pth").unlink(), (s / "consolidated.01.pth").symlink_to("consolidated.01.pth")),
        "source has consolidated.01.pth, which cannot be read (Too many levels of symbolic links): fetch it again",
    ),
    "a directory": (
        lambda s: ((s / "consolidated.01.pth").unlink(), (s / "consolidated.01.pth").mkdir()),
        "source has consolidated.01.pth, which is a folder and no file: put the file itself",
    ),
    "no dict": (lambda s: torch.save([torch.zeros(1)], s / "consolidated.01.pth"), "consolidated.01.pth holds no dict of tensors"),
    "int4": (
        lambda s: torch.save({}, s / "int4_scales_0.pt"),
        "source is Meta's int4 checkpoint, which is not supported: use the bfloat16",
    ),
    "a tensor too few": (
        lambda s: edit_rank(s / "consolidated.01.pth", lambda e: e.pop("norm.weight")),
        "norm.weight is in some of the 2 consolidated.*.pth and not in all: fetch them again.",
    ),
    "a tensor in neither": (
        lambda s: [edit_rank(s / f"consolidated.0{rank}.pth", lambda e: e.pop("norm.weight")) for rank in (0, 1)],
        "source lacks norm.weight: config and weights belong to different models: fetch both from one place.",
    ),
    "a tensor too many": (
        lambda s: [edit_rank(s / f"consolidated.0{rank}.pth", lambda e: e.update(extra=torch.zeros(1))) for rank in (0, 1)],
        "source has the unexpected extra",
    ),
    "two dtypes": (flip_type, "consolidated.01.pth: output.weight is float32, other parts of text.unembedding are bfloat16"),
    "not in C order": (transpose, "consolidated.00.pth: output.weight is not stored in C order"),
    "integers": (
        lambda s: edit_rank(s / "consolidated.00.pth", lambda e: e.update({"norm.weight": torch.zeros(160, dtype=torch.int8)})),
        "consolidated.00.pth: norm.weight has dtype torch.int8; ... are supported.",
    ),
    "another model's params": (lambda s: edit_params(s, n_heads=20, n_kv_heads=10), "the model's config asks for"),
    "heads that 2 files cannot share": (
        lambda s: edit_params(s, n_heads=15, n_kv_heads=5),
        "is not divided evenly by 2 files: some are missing, or params.json is another model's.",
    ),
    "no params": (lambda s: (s / "params.json").unlink(), "source is not a checkpoint: it has neither config.json nor params.json."),
    "FP8 without scales": (
        lambda s: [
            edit_rank(
                s / f"consolidated.0{rank}.pth",
                lambda e: e.update({name: e[name].to(torch.float8_e4m3fn) for name in e if ".experts.moe_w" in name}),
            )
            for rank in (0, 1)
        ],
        "source has FP8 values of text.layers.1.feed_forward.experts.down but no scale layers.1.feed_forward.experts.w2 in fp8_scales_*.pt",
    ),
    "scales of one rank only": (
        lambda s: torch.save({}, s / "fp8_scales_0.pt"),
        "source has 2 files consolidated.*.pth but 1 files fp8_scales_*.pt: fetch what is missing.",
    ),
    "files of other names": (leave("model.pth"), "source has no files consolidated.*.pth: fetch them under the names"),
    "a file without a number": (leave("consolidated.pth"), "source has no files consolidated.*.pth: fetch them under the names"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_checkpoint_is_refused_before_anything_is_made(source, tmp_path, damage, refused):
    """Hours of conversion, or a model of another one's weights, would come of it."""
    change, message = DAMAGED[damage]
    change(source)
    with refused(message):
        convert(source, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_torch_is_not_needed(two_ranks, tmp_path, monkeypatch):
    """It is an optional extra of some gigabytes, and what we do not import cannot run what a file holds."""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert convert(two_ranks, tmp_path / "out", progress=False).kind == "Meta .pth, 2 ranks"
