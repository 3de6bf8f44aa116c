"""Calls in what a model writes: the same ones come out, whole and cut at every place, and nothing is taken for a call that is none."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maverick_jax.serving.tools.choice import Function
from maverick_jax.serving.tools.reader import CallReader
from oracle.tool_calls import WRITERS, read

FUNCTIONS = [
    Function("weather", None, {"type": "object", "properties": {"city": {}, "days": {}}}),
    Function("math.factor-ial"),
    Function("time"),
]
TRICKY = {"city": "a, b) ] } \" ' \\ \n é 😀", "days": [1, -2.5, {"x": None, "y": [True, False]}], "class": "", "$top": {}, "two words": 0}
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
calls_of = st.lists(
    st.tuples(st.sampled_from(["weather", "math.factor-ial", "time"]), st.dictionaries(st.text(min_size=1), values, max_size=3))
)


def every_cut(text: str) -> list[list[int]]:
    return [[], *([cut] for cut in range(1, len(text))), list(range(1, len(text)))]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_the_same_calls_come_out_wherever_the_text_is_cut(write):
    """Quotes, brackets, escapes, keywords for names, nothing at all, and several calls."""
    calls = [("weather", TRICKY), ("time", {}), ("math.factor-ial", {"n": 10**30})]
    text = write(calls)
    for cuts in every_cut(text):
        said, found = read(text, FUNCTIONS, cuts)
        assert said == ""
        assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@given(calls=calls_of.filter(bool), seed=st.integers(0, 99))
def test_any_calls(write, calls, seed):
    """Any JSON, cut anywhere."""
    text = write(calls)
    said, found = read(text, FUNCTIONS, sorted(random.Random(seed).choices(range(len(text)), k=3)))
    assert said == ""
    assert [name for name, _ in found] == [name for name, _ in calls]
    assert [json.loads(arguments) for _, arguments in found] == [arguments for _, arguments in calls]


READ = {
    "by place": ("[weather('Paris', 3)]", "", [("weather", '{"city": "Paris", "days": 3}')]),
    "by a place that there is not": ("[time(1)]", "", [("time", '{"argument_1": 1}')]),
    "no value": ("[weather(city=home, days=2+x)]", "", [("weather", '{"city": "home", "days": "2+x"}')]),
    "what must never run": ("[time(a=__import__('os').abort())]", "", [("time", '{"a": "__import__(\'os\').abort()"}')]),
    "JSON's names": ("[time(a=true, b=null)]", "", [("time", '{"a": true, "b": null}')]),
    "a tuple": ("[time(a=(1, 2))]", "", [("time", '{"a": [1, 2]}')]),
    "no number of JSON": ("[time(a=1e999, b=1j)]", "", [("time", '{"a": "1e999", "b": "1j"}')]),
    "text of three quotes": ('[time(a="""it\'s "so" \\""" """)]', "", [("time", r'{"a": "it' + "'" + r's \"so\" \"\"\" "}')]),
    "behind a text": ("Let me look.\n\n[time()]", "Let me look.\n", [("time", "{}")]),
    "in front of one": ("[time()]\nThat is it.", "That is it.", [("time", "{}")]),
    "arguments as a text": (r'{"name": "time", "arguments": "{\"a\": 3}"}', "", [("time", '{"a": 3}')]),
    "no arguments": ('{"name": "time"}\n{"name": "time", "parameters": null}', "", [("time", "{}")] * 2),
    "an unknown tool": ("[places(a=1)]", "[places(a=1)]", []),
    "an unknown tool in JSON": ('{"name": "places", "parameters": {}}', '{"name": "places", "parameters": {}}', []),
    "other JSON": ('{"name": "time", "age": 5}', '{"name": "time", "age": 5}', []),
    "a list": ("[1, 2]", "[1, 2]", []),
    "a link": ("[time](https://example.org)", "[time](https://example.org)", []),
    "in the midst of a line": ("Say [time()]", "Say [time()]", []),
    "cut off": ('[weather(city="Paris", days="un', "", [("weather", '{"city": "Paris"')]),
    "cut off before": ("[wea", "[wea", []),
    "broken": ("[weather(city=1] and on\nand on", "city=1] and on\nand on", [("weather", "")]),
    "brackets without end": ("[weather(a=" + "(" * 300 + ")" * 300 + ")]", "", [("weather", json.dumps({"a": "(" * 300 + ")" * 300}))]),
    "text": ("\n\nHello [you],\n{you} too", "\n\nHello [you],\n{you} too", []),
}


@pytest.mark.parametrize("text, said, calls", READ.values(), ids=READ)
def test_what_is_a_call_and_what_is_not(text, said, calls):
    """Cut anywhere it is the same; what is no value stays its text, and is not evaluated."""
    for cuts in every_cut(text)[:: max(1, len(text) // 50)]:
        assert read(text, FUNCTIONS, cuts) == (said, calls)


def test_two_halves_of_a_character_are_one():
    """Models that learnt JSON escape so in Python too."""
    assert read(r"[time(a='\ud83d\ude00')]", FUNCTIONS) == ("", [("time", json.dumps({"a": "😀"}))])
    assert read(r"[time(a='\ud83d')]", FUNCTIONS) == ("", [("time", json.dumps({"a": r"'\ud83d'"}))])  # half of one is no text


def test_one_call_where_more_are_not_wanted():
    """The others are text."""
    assert read("[time(), time()]", FUNCTIONS, parallel=False) == (", time()]", [("time", "{}")])
    assert read('{"name": "time"}\n{"name": "time"}', FUNCTIONS, parallel=False) == ('{"name": "time"}', [("time", "{}")])


def test_text_does_not_wait():
    """Prose goes on as it comes, and an argument as soon as it is whole."""
    from maverick_jax.serving.tools.choice import tools

    reader = CallReader(tools(FUNCTIONS, "auto"))
    assert reader.push("Hel") == ["Hel"]
    assert reader.push("lo\n") == ["lo\n"]
    assert reader.push("[wea") == []
    assert [part.name for part in reader.push("ther(") if not isinstance(part, str)] == ["weather"]
    assert [part.arguments for part in reader.push("city='x',") if not isinstance(part, str)] == ['{"city": "x"']


def test_long_arguments_take_time_in_proportion():
    """A file of a megabyte in an argument: twice the length is twice the work, counted in steps of the reader's own."""
    text = "[time(a='" + "x" * 200_000 + "')]"
    assert read(text, FUNCTIONS, range(0, len(text), 1000)) == ("", [("time", json.dumps({"a": "x" * 200_000}))])
