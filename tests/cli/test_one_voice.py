"""Every command says the same of what is no checkpoint, and tells the same of one that is."""

import io
import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from maverick_jax.assets import mini_directory

KINDS = {
    "adapter": ("adapter_config.json", "is an adapter (LORA) of the base model org/base, and no model itself"),
    "gguf": ("model.gguf", "holds GGUF (llama.cpp) files, which are not read"),
    "tokenizer": ("tokenizer.json", "holds a tokenizer alone"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_line_for_all_commands(maverick, tmp_path, kind):
    name, message = KINDS[kind]
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / name).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}))
    commands = [
        ("convert", source, out),
        ("convert", source, out, "--dry-run"),
        ("inspect", source),
        ("verify", source),
        ("export", source, out),
        ("generate", "hi", "-m", source),
        ("generate", "hi", "-m", source, "--mesh", "expert=8"),
        ("chat", "-m", source),
        ("plan", "-m", source, "--topology", "v6e:8x8"),
    ]
    results = [maverick(*command) for command in commands]
    assert {result.status for result in results} == {2}
    (line,) = {result.err for result in results}
    assert line.startswith(f"maverick: {source} {message}")
    assert line.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [source]


def test_a_prefix_is_told_once(maverick, tmp_path, monkeypatch):
    """On standard error, so that what reads the result is not disturbed."""
    monkeypatch.setattr("maverick_jax.cli.verify._compare", lambda *_: None)  # minutes, and nothing of it is about names
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    source = shutil.copytree(mini_directory(), tmp_path / "source")
    file = source / "model.safetensors"
    save_file({f"module.{name}": array for name, array in load_file(file).items()}, file)
    note = "maverick: note: names are read without module., which other tools put into them."
    model = tmp_path / "model"
    commands = [
        ("convert", source, model, "--dry-run"),
        ("convert", source, model, "--quiet"),
        ("verify", model, "--against", source, "--quiet"),
        ("inspect", source, "--json"),
        ("chat", "-m", source, "--mesh", "expert=1"),
    ]
    for command in commands:
        result = maverick(*command)
        assert result.status == 0, result.err
        assert result.err.splitlines().count(note) == 1, command
        assert "module." not in result.out or command[0] == "inspect"
    assert maverick("inspect", model).err == ""
