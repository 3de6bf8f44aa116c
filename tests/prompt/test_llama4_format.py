"""The format of the releases, which a checkpoint without a template of its own gets."""

import json

import pytest

from maverick_jax.errors import UserError
from maverick_jax.prompt import Tokenizer, render
from maverick_jax.training.mini.definition import mini_config, mini_tokenizer
from oracle.conversations import SCHEMA, add, call

TOKENIZER = Tokenizer(mini_tokenizer())
CONFIG = mini_config(mini_tokenizer())


def ids(messages, **options) -> list[int]:
    return render(messages, TOKENIZER, CONFIG, **options).token_ids


def header(role: str) -> list[int]:
    start, end = TOKENIZER.id_of("<|header_start|>"), TOKENIZER.id_of("<|header_end|>")
    return [start, *TOKENIZER.encode(role), end, *TOKENIZER.encode("\n\n")]


def turn(role: str, *texts: str, end: str = "<|eot|>") -> list[int]:
    return [*header(role), *(id for text in texts for id in TOKENIZER.encode(text)), TOKENIZER.id_of(end)]


BEGIN = [TOKENIZER.id_of("<|begin_of_text|>")]
ASK = {"role": "user", "content": "How warm?"}


def test_calls_and_results():
    """Each call as the reference writes it; calls and results end a message, not the turn; results come from `ipython`."""
    calls = [call("weather", {"city": "Zürich"}), call("f", '{"a": [1, null]}'), {"function": {"name": "g", "arguments": None}}]
    messages = [ASK, {"role": "assistant", "content": "I ask.", "tool_calls": calls}]
    messages += [
        {"role": "tool", "content": "21"},
        {"role": "ipython", "content": {"a": ["é", None]}},
        {"role": "tool", "content": [1, "b"]},
    ]
    messages += [
        {"role": "tool", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
        {"role": "assistant", "content": "Ok."},
    ]
    written = [
        '{"type": "function", "name": "weather", "parameters": {"city": "Zürich"}}',
        '{"type": "function", "name": "f", "parameters": {"a": [1, null]}}',
        '{"type": "function", "name": "g", "parameters": {}}',
    ]
    results = [["21"], ['{"a": ["é", null]}'], ['[1, "b"]'], ["x", "y"]]
    expected = [*BEGIN, *turn("user", "How warm?"), *turn("assistant", "I ask.", *written, end="<|eom|>")]
    expected += [id for result in results for id in turn("ipython", *result, end="<|eom|>")]
    assert ids(messages) == [*expected, *turn("assistant", "Ok."), *header("assistant")]


def test_a_result_that_only_looks_like_parts():
    for content in ([{"type": "text"}], [{"type": "text", "text": 5}], [{"type": "city"}]):
        assert ids([{"role": "tool", "content": content}], add_generation_prompt=False) == [
            *BEGIN, *turn("ipython", json.dumps(content), end="<|eom|>")
        ]  # fmt: skip


@pytest.mark.parametrize("nothing", [{"tool_calls": None}, {"tool_calls": []}, {}])
def test_null_is_not_there(nothing):
    messages = [ASK, {"role": "assistant", "content": None, **nothing}, {"role": "user", "content": "?", "name": None}]
    assert ids(messages) == [*BEGIN, *turn("user", "How warm?"), *turn("assistant"), *turn("user", "?"), *header("assistant")]


@pytest.mark.parametrize("system", [None, "Be brief.", [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]])
def test_tools_are_listed_in_the_system_message(system):
    """As JSON, behind what the system message says; a model that is not told of its tools cannot call them."""
    messages = [ASK] if system is None else [{"role": "system", "content": system}, ASK]
    text = TOKENIZER.decode(ids(messages, tools=[SCHEMA, add]))
    begin, end = text.index("[\n"), text.rindex("]\n") + 1
    listed = json.loads(text[begin:end])
    assert [function["name"] for function in listed] == ["search", "add"]
    assert listed[0] == SCHEMA["function"]
    assert text.startswith("system\n\nHere is" if system is None else "system\n\nBe brief.\n\nHere is")
    assert text.endswith("user\n\nHow warm?assistant\n\n")
    assert ids(messages, tools=[]) == ids(messages)


def test_without_generation_prompt_and_continued():
    messages = [ASK, {"role": "assistant", "content": "It is "}]
    said = [*BEGIN, *turn("user", "How warm?"), *turn("assistant", "It is ")]
    assert ids(messages, add_generation_prompt=False) == said
    assert ids(messages, continue_final_message=True) == said[:-1]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "assistant", "tool_calls": [call("f", "{")]}, "are no JSON"),
        ({"role": "assistant", "tool_calls": ["f"]}, "no function with a name"),
        ({"role": "assistant", "tool_calls": [call(None, {})]}, "no function with a name"),
        ({"role": "assistant", "tool_calls": 5}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [call("f", {"a": {1, 2}})]}, "cannot be written as JSON"),
        ({"role": "tool", "content": {(1, 2): 3}}, "cannot be written as JSON"),
        ({"role": "developer", "content": "a"}, "unknown to the format"),
        ({"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}, "neither"),
    ],
)
def test_what_the_format_has_no_place_for(message, expected):
    with pytest.raises(UserError, match=expected) as refused:
        ids([message])
    assert "\n" not in str(refused.value)


def test_a_tokenizer_without_the_control_tokens():
    """Of another family: the format would be written in words that the model has never seen."""
    other = mini_tokenizer()
    other["added_tokens"] = [token for token in other["added_tokens"] if token["content"] != "<|header_start|>"]
    with pytest.raises(UserError, match=r"has no <\|header_start\|>: it does not belong to a Llama 4 checkpoint"):
        render([ASK], Tokenizer(other), CONFIG)
