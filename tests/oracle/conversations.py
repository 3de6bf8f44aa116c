"""Conversations of every kind that chat templates meet, and a tokenizer for them as ours and as transformers'."""

import enum
import json
from typing import Any, Literal

import tokenizers
from PIL import Image

from maverick_jax.prompt import Tokenizer
from maverick_jax.training.mini.definition import mini_tokenizer

SQUARE = Image.new("RGB", (32, 32))
NAMED = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", "pad_token": "<|finetune_right_pad|>"}


def description() -> dict[str, Any]:
    """The mini model's tokenizer with four tokens that are vocabulary, not control."""
    description = mini_tokenizer()
    first = max(token["id"] for token in description["added_tokens"]) + 1
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    for i, content in enumerate(["<think>", "</think>", "<tool_call>", "</tool_call>"]):
        description["added_tokens"].append({"id": first + i, "content": content, **flags})
    return description


def our_tokenizer() -> Tokenizer:
    return Tokenizer(description())


def their_tokenizer(template: str | dict[str, str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    theirs = tokenizers.Tokenizer.from_str(json.dumps(description()))
    return PreTrainedTokenizerFast(tokenizer_object=theirs, chat_template=template, **NAMED)


class Unit(enum.Enum):
    METRIC = "metric"
    IMPERIAL = "imperial"


def weather(city: str, days: int = 3, unit: Unit = Unit.METRIC, kind: Literal["short", "long"] | None = None) -> dict[str, float]:
    """The weather
    of the next days.

    Args:
        city: Where,
            with the country
        days: how many days (choices: [1, 3, 7])
        unit: Celsius: or Fahrenheit
        kind: how much text

    Returns:
        Temperatures by day
    """
    raise NotImplementedError


def add(a: float, b: int | float | None, c: list[tuple[int, str]] | None = None, d: Any = None):
    """Add.

    Args:
        a: one
        b: other
        c: pairs
        d: anything
    """


SCHEMA = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Looks \"things\" up — ünïcode, <b>tags</b> & 'quotes'",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "enum": ["a", "b"]}, "limit": {"type": "integer", "default": 5}},
            "required": ["query"],
        },
    },
}


def system(content):
    return {"role": "system", "content": content}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def tool(content, **more):
    return {"role": "tool", "content": content, **more}


def text(value):
    return {"type": "text", "text": value}


def call(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


IMAGE = {"type": "image", "image": SQUARE}
CALL = call("weather", {"city": "Zürich", "days": 2})
BOTH = [CALL, call("search", {"query": "a", "nested": {"list": [1, 2.5, None, True], "text": 'x"y\\z\n'}}, id="call_1")]
ASKED = [user("How warm is it?"), assistant("", tool_calls=[CALL])]

PLAIN = [
    [user("Hello")],
    [user("")],
    [user(" Hello \n")],
    [user("\n\nHello")],
    [system("Be brief."), user("Hello")],
    [system("  Be brief.\n"), user("Hello"), assistant("Hi!"), user("And now?")],
    [system(""), user("Hello")],
    [system([text("Be brief. ")]), user([text("Which is larger?")])],
    [system([text("Be brief. "), text("Be kind.")]), user([text("Which "), text("is larger?")]), assistant([text("Left.")]), user("Sure?")],
    [user("naïve café 日本語 🙂\u0301")],
    [user("line\r\nline\ttab\x0b\x1c end\u2028")],
    [user("a < b and b > c, {{ x }} {% if %} <b>"), assistant("</s> [INST] <bos>"), user("| |> <|")],
    [user("Hello"), user("again"), user("and again")],
    [assistant("I begin."), user("Go on.")],
    [user("Hello", name="Ada", extra={"deep": [1, None]})],
    [user("12345678 90 3.14159")],
    [user("x" * 2000), assistant("word " * 500), user("?")],
    [user("Hello"), assistant(None), user("Hello?")],
    [user("Hello"), assistant("Hi", tool_calls=None, name=None), user("Bye")],
]
THINKING = [
    [user("2+2?"), assistant("<think>easy</think>4"), user("3+3?")],
    [user("2+2?"), assistant("<think>\neasy\n</think>\n\n4"), user("3+3?"), assistant("<think>hm</think>6"), user("really?")],
    [user("2+2?"), assistant("4", reasoning_content="easy"), user("3+3?")],
    [user("2+2?"), assistant("4", thinking="easy"), user("3+3?")],
    [user("2+2?"), assistant("4", reasoning="easy", reasoning_content=None), user("3+3?")],
    [user("2+2?"), assistant("4", thinking="easy")],
    [user("2+2?"), assistant("4", reasoning="easy", thinking=None)],
    [user("what does </think> mean?"), assistant("<think>it</think> ends </think> twice"), user("ok <think>")],
    [user("2+2?"), assistant("<think>never ends"), user("3+3?")],
    [user("2+2?"), assistant("no beginning</think>4"), user("3+3?")],
    [user("<think>I think</think>so")],
    [user("2+2?"), assistant([text("<think>a</think>"), text("b")]), user("3+3?")],
    [system("Answer in <think> tags."), user("<tool_call>hi</tool_call>"), assistant("</think></think>"), user("")],
]
CALLING = [
    ASKED,
    [*ASKED, tool("21.5")],
    [*ASKED, tool("")],
    [*ASKED, tool({"warm": True, "degrees": [20, 21.5], "note": None, "ö": "ß"})],
    [*ASKED, tool([1, "two", {"three": 3}])],
    [*ASKED, tool([text("21.5"), text(" degrees")])],
    [*ASKED, tool("21.5", name="weather", tool_call_id="call_7"), assistant("Warm."), user("Thanks")],
    [user("Both?"), assistant("I ask. ", tool_calls=BOTH), tool("21.5"), tool({"found": []}), assistant("Here."), user("More")],
    [user("Both?"), assistant([text("I "), text("ask.")], tool_calls=BOTH), tool("x")],
    [user("Both?"), assistant("", tool_calls=[]), user("?")],
    [user("Both?"), assistant("none", tool_calls=None), user("?")],
    [system("Use tools."), *ASKED, tool("1 < 2 & 3 > 2")],
    [system([text("Use "), text("tools.")]), *ASKED, {"role": "ipython", "content": "21.5"}],
    [user("How?"), assistant("", tool_calls=[call("weather", {})]), tool("nothing")],
    [user("How?"), assistant("", tool_calls=[call("weather", '{"city": "Bern"}')]), tool("0")],
    [user("How?"), assistant("", tool_calls=[call("f", {"b": 1, "a": {"z": "é", "y": 1e-7}})], reasoning_content="I call."), tool("0")],
    [user("How?"), assistant("<think>I call</think>", tool_calls=[CALL]), tool("0"), assistant("<think>so</think>0"), user("!")],
    [*ASKED, tool(3.5)],
    [*ASKED, tool(True)],
]
PICTURES = [
    [user([IMAGE, text("What is it?")])],
    [user([text("This "), IMAGE, text(" and "), IMAGE, text("?")])],
    [system("Look."), user([IMAGE]), assistant("A square."), user([IMAGE, text("And this?")])],
    [user([text("a"), IMAGE]), assistant("<think>black</think>Black."), user("Why?")],
]
WITH_TOOLS = [None, [], [SCHEMA], [SCHEMA, weather, add]]
