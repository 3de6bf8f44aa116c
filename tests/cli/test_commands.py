"""Each subcommand does what its help says."""

import io
import json

import numpy as np
import pytest
from flax import nnx

import maverick_jax as mj
from maverick_jax.assets import digits, mini_directory
from maverick_jax.cli.main import COMMANDS

QUESTION, _, _, EXPECTED = digits.held_out_examples(23)[22]


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_has_an_example(maverick, command):
    result = maverick(command, "--help")
    assert result.status == 0
    assert f"\n  maverick {command}" in result.out


def test_version(maverick):
    assert maverick("--version").out == f"maverick-jax {mj.__version__}\n"


def test_generate_streams_the_answer_and_ends_with_the_speed(maverick, pictures):
    result = maverick("generate", QUESTION, "--image", pictures[0], "--image", pictures[1])
    assert result.status == 0
    assert result.out == f"{EXPECTED}\n"
    assert "tokens/s" in result.err.splitlines()[-1]


def test_generate_json(maverick, pictures):
    """One line that a program can read; `stop` and `max_new_tokens` reach the model."""
    images = [word for picture in pictures for word in ("--image", picture)]
    result = json.loads(maverick("generate", QUESTION, *images, "--json").out)
    assert result["text"] == EXPECTED
    assert result["cached_tokens"] == 0
    assert set(result["seconds"]) == {"compile", "prefill", "decode"}
    before = EXPECTED.split("=")[0]
    assert json.loads(maverick("generate", QUESTION, *images, "--json", "--stop", "=").out)["text"] == before
    assert json.loads(maverick("generate", QUESTION, *images, "--json", "--max-new-tokens", 2).out)["new_tokens"] == 2


def test_generate_on_a_named_mesh_and_from_standard_input(maverick, pictures, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION))
    images = [word for picture in pictures for word in ("--image", picture)]
    assert maverick("generate", "-", *images, "--mesh", "data=2,expert=2,tensor=2").out == f"{EXPECTED}\n"


def test_raw_continues_text(maverick):
    """Base models have no chat format: the prompt is the begin-of-text token and the text."""
    result = json.loads(maverick("generate", "--raw", "What is", "--json", "--max-new-tokens", 3, "--mesh", "expert=1").out)
    model = mj.load()
    chat = mj.Chat(model)
    ids = [model.config.bos_token_id, *chat.tokenizer.encode("What is")]
    assert result["prompt_tokens"] == len(ids)
    assert result["text"] == chat.tokenizer.decode(mj.generate(model, [ids], max_new_tokens=3)[0])


def test_chat_keeps_the_conversation(maverick, pictures, monkeypatch):
    """Pictures belong to the next question; a mistake does not end the chat; /reset forgets."""
    lines = [
        f"/image {pictures[0]}",
        f"/image {pictures[1]}",
        QUESTION,
        "/image absent.png",
        "/nonsense",
        QUESTION,
        "/reset",
        "/quit",
        "no",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    result = maverick("chat", "--json", "--max-new-tokens", 16)
    first, second = map(json.loads, result.out.splitlines())
    assert result.status == 0
    assert first["text"] == EXPECTED
    assert second["prompt_tokens"] > first["prompt_tokens"]  # the first question and answer are still there
    assert "absent.png" in result.err
    assert "/nonsense is no command" in result.err


def test_convert_inspect_export(maverick, tmp_path):
    """There and back gives the same tensors, and `inspect` reads both kinds of directory."""
    assert maverick("convert", mini_directory(), tmp_path / "model").status == 0
    assert maverick("export", tmp_path / "model", tmp_path / "again").status == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (mini_directory() / "model.safetensors").read_bytes()
    folders = (mini_directory(), tmp_path / "model", tmp_path / "again")
    counted = {json.loads(maverick("inspect", folder, "--json").out)["parameters"] for folder in folders}
    leaves = nnx.to_flat_state(nnx.state(mj.get_abstract_model(mj.Config.from_directory(mini_directory()))))
    assert counted == {sum(np.prod(leaf.shape) for _, leaf in leaves)}
    table = maverick("inspect", tmp_path / "model").out
    assert "text.layers.1.feed_forward.experts.gate" in table
    assert "128 x 64 x 32" in table
