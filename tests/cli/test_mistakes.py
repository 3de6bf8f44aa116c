"""Every mistake of a user ends with status 2 and one line that names the thing and the cure."""

import json
import shutil

import pytest
from PIL import Image

from maverick_jax.assets import mini_directory
from maverick_jax.cli.main import MISTAKE
from maverick_jax.errors import UserError


@pytest.fixture
def broken(tmp_path):
    """A copy of the mini model to break."""
    shutil.copytree(mini_directory(), tmp_path / "hf")
    return tmp_path / "hf"


def expect(result, *words):
    assert result.status == 2
    assert result.err.startswith("maverick: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert str(word) in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "hi", "-m", "nowhere"), ["nowhere does not exist"]),
        (("generate", ""), ["prompt is empty"]),
        (("generate", "hi", "--mesh", "expert=3"), ["expert = 3", "128 experts"]),
        (("generate", "hi", "--mesh", "tensor=4"), ["tensor = 4", "key/value heads"]),
        (("generate", "hi", "--mesh", "expert=1024"), ["needs 1024 devices, there are 8"]),
        (("generate", "hi", "--mesh", "experts=8"), ["--mesh", "experts=8"]),
        (("generate", "hi", "--temperature", "-1"), ["temperature is -1"]),
        (("generate", "hi", "--top-p", "0"), ["top_p is 0"]),
        (("generate", "hi", "--max-new-tokens", "0"), ["max_new_tokens is 0"]),
        (("generate", "hi", "--max-new-tokens", "5000"), ["the context holds 4096"]),
        (("generate", "long " * 5000, "--mesh", "expert=1"), ["the context holds 4096"]),
        (("generate", "hi", "--image", "absent.png"), ["absent.png"]),
        (("generate", "hi", "--raw", "--system", "Be brief"), ["--raw"]),
        (("batch", "in", "out", "--adapter", "a=one", "--adapter", "a=two"), ["--adapter", "a is the name of two"]),
        (("batch", "in", "out", "--adapter", "one", "--adapter", "a=two"), ["--adapter", "one has no name, and others have"]),
        (("batch", "in", "out", "--adapter", "one", "--adapter", "two"), ["--adapter", "two is a second one without a name"]),
        (("batch", "in", "out", "--adapter", "=one"), ["--adapter", "lacks its name: write NAME=DIR"]),
        (("convert", "nowhere", "out"), ["nowhere"]),
        (("export", "nowhere", "out"), ["nowhere"]),
        (("inspect", "nowhere"), ["nowhere"]),
        (("demo", "--example", "-1"), ["--example"]),
    ],
)  # fmt: skip
def test_arguments(maverick, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect(maverick(*arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_pictures(maverick, tmp_path):
    """Unreadable, empty and over-wide pictures are refused before a model is loaded."""
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    Image.new("L", (50_000, 1)).save(tmp_path / "wide.png")
    for name, word in (("empty.png", "is empty"), ("text.jpg", "cannot be read"), ("wide.png", "50000 x 1")):
        expect(maverick("generate", "hi", "--image", tmp_path / name, "-m", "nowhere"), name, word)


def test_not_a_checkpoint(maverick, tmp_path):
    (tmp_path / "empty").mkdir()
    for command in (("convert", tmp_path / "empty", tmp_path / "out"), ("generate", "hi", "-m", tmp_path / "empty")):
        expect(maverick(*command), "empty")
    assert not (tmp_path / "out").exists()


def test_truncated_weights(maverick, broken, tmp_path):
    """A download that stopped early must be noticed before anything is written or answered."""
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for command in (("convert", broken, tmp_path / "out"), ("generate", "hi", "-m", broken), ("inspect", broken)):
        expect(maverick(*command), "model.safetensors", "100 bytes")
    assert not (tmp_path / "out").exists()


def test_unknown_quantization(maverick, broken, tmp_path):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "nvfp4"}}))
    for command in (("convert", broken, tmp_path / "out"), ("generate", "hi", "-m", broken)):
        expect(maverick(*command), "nvfp4")


def test_existing_destination(maverick, broken, tmp_path):
    """Nothing that is there is overwritten."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    expect(maverick("convert", broken, tmp_path / "out"), "out exists")
    assert (tmp_path / "out" / "precious").read_text() == "kept"


def test_unfinished_conversion_is_no_model(maverick, broken, tmp_path):
    (broken / "manifest.json").unlink(missing_ok=True)
    assert maverick("convert", broken, tmp_path / "out").status == 0
    (tmp_path / "out" / "manifest.json").unlink()
    expect(maverick("generate", "hi", "-m", tmp_path / "out"), "not a finished model directory")


def test_debug_shows_the_traceback(maverick):
    with pytest.raises(UserError, match="nowhere"):
        maverick("generate", "hi", "-m", "nowhere", "--debug")


def test_an_unknown_command_lists_the_known(maverick):
    result = maverick("fly")
    assert result.status == 2
    assert "generate" in result.err


@pytest.mark.parametrize("options", ["--quantize shared", "--format bfloat16 --quantize shared", "--format int8 --quantize ,"])
def test_a_quantize_that_would_do_nothing_is_refused(maverick, tmp_path, options):
    result = maverick("convert", mini_directory(), tmp_path / "out", *options.split())
    assert result.status == MISTAKE
    assert "takes a format that quantizes (fp8, int8, int4)" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_no_threads_are_too_few(maverick, tmp_path, command):
    result = maverick(command, mini_directory(), *([tmp_path / "out"] if command == "convert" else []), "--workers", 0)
    assert result.status == MISTAKE
    assert "'0' is not a number of 1 or more" in result.err


def test_weights_that_are_no_numbers(maverick, broken):
    """The most likely token of NaN is 0, for ever: the damaged layer is named instead."""
    file = broken / "model.safetensors"
    data = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    name = next(name for name in header if name.endswith("layers.1.self_attn.o_proj.weight"))
    at = begin + header[name]["data_offsets"][0]
    data[at : at + 2] = b"\xc0\x7f"  # NaN in bfloat16
    file.write_bytes(data)
    result = maverick("generate", "hi", "-m", broken, "--mesh", "data=1")
    expect(result, "the prompt", "not finite", "text.layers.1 is the first layer", "text.layers.1.attention.output")
