"""Which template and which named tokens a checkpoint directory brings, as transformers reads them."""

import json

import pytest

from maverick_jax.errors import UserError
from maverick_jax.prompt import load_template, render
from maverick_jax.training.mini.definition import mini_config, mini_tokenizer
from oracle.conversations import SCHEMA, description, our_tokenizer

OURS = our_tokenizer()
CONFIG = mini_config(mini_tokenizer())
SHOWS_TOKENS = "{{ bos_token }}-{{ eos_token }}-{{ pad_token }}-{{ unk_token }}-{{ image_token }}"
BOS = {"content": "<|begin_of_text|>", "__type": "AddedToken"}
EXTRA = {"image_token": "<|image|>"}
MESSAGES = [{"role": "user", "content": "Hello"}]


def write(directory, **files) -> None:
    """Files by their names, `__` for the point."""
    (directory / "tokenizer.json").write_text(json.dumps(description()))
    for name, content in files.items():
        file = directory / name.replace("__", ".")
        file.write_text(content if isinstance(content, str) else json.dumps(content))


def both(directory, **options) -> tuple[list[int], list[int]]:
    """Token ids by our reading of a directory and by transformers'."""
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    ours = render(MESSAGES, OURS, CONFIG, template=load_template(directory), **options).token_ids
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    return ours, theirs.apply_chat_template(MESSAGES, return_dict=False, add_generation_prompt=True, **options)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config__json": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", "pad_token": "<|finetune_right_pad|>"}},
        {"tokenizer_config__json": {"bos_token": BOS, "eos_token": "<|eom|>", "pad_token": None}},
        {
            "tokenizer_config__json": {"bos_token": "<|eot|>", "eos_token": "<|eom|>", "pad_token": None},
            "special_tokens_map__json": {"bos_token": {"content": "<|begin_of_text|>", "lstrip": False}, "eos_token": "<|eot|>"},
        },
        {
            "tokenizer_config__json": {"bos_token": None, "eos_token": "<|eom|>", "pad_token": None, "image_token": "<|image|>"},
            "special_tokens_map__json": {"pad_token": "<|patch|>"},
        },
        {"tokenizer_config__json": {"bos_token": None, "eos_token": None, "pad_token": None, "extra_special_tokens": EXTRA}},
        {
            "tokenizer_config__json": {"bos_token": None, "eos_token": "<|eot|>", "pad_token": None, "added_tokens_decoder": {}},
            "special_tokens_map__json": {"bos_token": "<|eom|>"},
        },
    ],
)
def test_named_tokens(tmp_path, files):
    """A template that ends turns with `eos_token` says nothing where the name is missing, or the wrong thing."""
    write(tmp_path, chat_template__jinja=SHOWS_TOKENS, **files)
    ours, theirs = both(tmp_path)
    assert ours == theirs


def test_names_that_no_file_mentions_are_those_of_the_releases(tmp_path):
    write(tmp_path, chat_template__jinja=SHOWS_TOKENS)
    ids = render(MESSAGES, OURS, CONFIG, template=load_template(tmp_path)).token_ids
    assert ids == OURS.encode("<|begin_of_text|>-<|eot|>-<|finetune_right_pad|>--", allow_special=True)


NAMED = {"bos_token": None, "eos_token": None, "pad_token": None}
LIST = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}, {"name": "rag", "template": "{% broken"}]


@pytest.mark.parametrize("tools", [None, [], [SCHEMA]], ids=["none", "empty", "one"])
@pytest.mark.parametrize(
    "files",
    [
        {"chat_template__jinja": "j", "tokenizer_config__json": NAMED | {"chat_template": "c"}},
        {"tokenizer_config__json": NAMED | {"chat_template": "c"}},
        {"tokenizer_config__json": NAMED | {"chat_template": LIST}},
        {"chat_template__jinja": "j", "tokenizer_config__json": NAMED | {"chat_template": LIST}},
        {"chat_template__jinja": "j", "tokenizer_config__json": NAMED, "additional_chat_templates/tool_use__jinja": "a"},
        {"tokenizer_config__json": NAMED | {"chat_template": "c"}, "additional_chat_templates/default__jinja": "a"},
    ],
)
def test_which_template(tmp_path, files, tools):
    (tmp_path / "additional_chat_templates").mkdir()
    write(tmp_path, **files)
    ours, theirs = both(tmp_path, tools=tools)
    assert ours == theirs


def test_templates_of_the_processor(tmp_path):
    """Checkpoints with pictures had theirs in a file of its own; without any file there is none."""
    assert load_template(tmp_path) is None
    write(tmp_path, chat_template__json={"chat_template": "p"}, tokenizer_config__json={"chat_template": "c"})
    assert render(MESSAGES, OURS, CONFIG, template=load_template(tmp_path)).token_ids == OURS.encode("p")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config__json": "["}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config__json": "[" * 100_000}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config__json": "[]"}, "holds no JSON object"),
        ({"tokenizer_config__json": {"chat_template": 5}}, "neither a text nor a list"),
        ({"tokenizer_config__json": {"chat_template": [{"name": "default"}]}}, "neither a text nor a list"),
        ({"tokenizer_config__json": {"chat_template": ["default"]}}, "neither a text nor a list"),
        ({"tokenizer_config__json": {"chat_template": {"default": None}}}, "neither a text nor a list"),
        ({"tokenizer_config__json": {"chat_template": {"default": "{% for %}"}}}, "has an error in line 1"),
        ({"tokenizer_config__json": {"chat_template": [{"name": "rag", "template": "r"}]}}, "none is 'default'"),
        ({"chat_template__jinja": "x", "special_tokens_map__json": "{"}, "special_tokens_map.json is not valid JSON"),
    ],
)
def test_broken_files_are_one_line(tmp_path, files, message):
    write(tmp_path, **files)
    with pytest.raises(UserError, match=message) as refused:
        render(MESSAGES, OURS, CONFIG, template=load_template(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_template_that_is_no_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        load_template(tmp_path)
