"""What is beside the weights is tried before them: a conversion of hours shall not end with a template that nobody can use."""

import json
import shutil

import pytest

from maverick_jax.assets import mini_directory
from maverick_jax.convert import convert, export
from maverick_jax.convert.build.estimate import estimate
from maverick_jax.convert.formats import tensor_file
from maverick_jax.convert.formats.prompting import check_prompting

BROKEN = {
    "a template with an error": ("chat_template.jinja", "{% for message in messages", "has an error in line 1"),
    "a template of another encoding": ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja cannot be read"),
    "a template that was not fetched": ("chat_template.jinja", "version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
    "a named template with an error": ("additional_chat_templates/tool_use.jinja", "{{", "has an error in line 1"),
    "a tokenizer that is none": ("tokenizer.json", "{}", "tokenizer.json is no tokenizer that can be read"),
    "a tokenizer that was cut short": ("tokenizer.json", '{"model": {', "tokenizer.json is not valid JSON"),
    "a tokenizer_config.json of another kind": ("tokenizer_config.json", "[]", "tokenizer_config.json holds no JSON object"),
}


@pytest.fixture
def source(maverick, tmp_path):
    return shutil.copytree(maverick.source, tmp_path / "source")


@pytest.mark.parametrize("case", BROKEN)
def test_it_is_refused_before_a_weight_is_read(source, maverick, tmp_path, monkeypatch, refused, case):
    name, content, message = BROKEN[case]
    model = shutil.copytree(maverick.converted, tmp_path / "model")
    for directory in (source, model):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
    monkeypatch.setattr(tensor_file.os, "preadv", lambda *_: pytest.fail("read weights"))
    for make, directory, options in (
        (convert, source, {}),
        (convert, model, {"target": "int8"}),
        (estimate, source, {}),
        (export, model, {}),
    ):
        with refused(message):
            make(directory, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_what_is_missing_is_said_once_and_is_no_mistake(source, tmp_path):
    """A base checkpoint has no template; of some fine-tunes the tokenizer was forgotten."""
    (source / "chat_template.jinja").unlink()
    note = f"{source} has no chat template: chats take the format of the releases; for another, add its chat_template.jinja."
    assert convert(source, tmp_path / "one").notes == estimate(source, tmp_path / "two").notes == (note,)
    (source / "tokenizer.json").unlink()
    (found,) = convert(source, tmp_path / "three").notes
    assert "has no tokenizer.json or tokenizer.model, and no chat template: copy them from" in found


def test_a_template_in_the_config_of_the_tokenizer_counts(source):
    (source / "chat_template.jinja").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert check_prompting(source) == []
    assert check_prompting(mini_directory()) == []
