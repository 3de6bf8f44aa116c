"""Which files of a directory are read, and what is said of those that cannot be."""

import json

import pytest

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from oracle.release_files import release


def test_generation_config_decides_where_to_stop(tmp_path):
    """Fine-tunes change their stop tokens there and leave config.json as it was."""
    (tmp_path / "config.json").write_text(json.dumps(release()))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert Config.from_directory(tmp_path).eos_token_id == (7,)


@pytest.mark.parametrize(
    "content, message", [("{", "not valid JSON"), ("[]", "no JSON object"), ("{}", "model_type is None"), (None, "neither")]
)
def test_broken_directories_are_named(tmp_path, content, message):
    """One line says which file and what is wrong with it."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        Config.from_directory(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("eos", [["<|eot|>"], "7", 7.0, True, [[7]], {"eos": 7}, -1, 2**31])
def test_stop_tokens_that_are_none_are_named(tmp_path, eos):
    """A stop token that no id equals would never stop."""
    (tmp_path / "config.json").write_text(json.dumps(release()))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is .* it must be a token id or a list of token ids\."):
        Config.from_directory(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "7", "", "[" * 100_000, '{"a": NaN', "\ufeff{}"])
@pytest.mark.parametrize("name", ["config.json", "params.json", "generation_config.json"])
def test_files_that_are_no_json_object(tmp_path, name, content):
    """One line names the file, however deep the nonsense in it."""
    if name == "generation_config.json":
        (tmp_path / "config.json").write_text(json.dumps(release()))
    (tmp_path / name).write_text(content, encoding="utf-8")
    reason = r"(is not valid JSON \(.*\)|holds no JSON object|is empty, for .*)"
    with pytest.raises(UserError, match=rf"^{tmp_path / name} {reason}: fetch it again( or remove it)?\.$"):
        Config.from_directory(tmp_path)


def test_of_two_fields_of_one_name_the_last_counts(tmp_path):
    """As transformers, and whatever else reads the file with Python, has it."""
    text = json.dumps(release()).replace('"attention_chunk_size": 8192', '"attention_chunk_size": 16, "attention_chunk_size": 32')
    (tmp_path / "config.json").write_text(text)
    assert Config.from_directory(tmp_path).text.attention_chunk_size == 32
