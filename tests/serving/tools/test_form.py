"""Answers that must call: whatever the model likes, a call of an allowed tool comes, with arguments of its schema."""

import json

import jsonschema
import pytest

import maverick_jax as mj
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.grammar import Grammar
from maverick_jax.inference.request import Request
from maverick_jax.inference.sampling import Sampling
from maverick_jax.prompt import Tokenizer
from maverick_jax.serving.answer import Answer, Call
from maverick_jax.serving.tools.choice import Function, tools
from maverick_jax.serving.tools.form import form_of

pytest.importorskip("llguidance", reason="llguidance, of the extra `grammar`, is not installed")
CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/c"}}, "required": ["city"], "$defs": {"c": {"enum": ["Rome", "Oslo"]}}}
FUNCTIONS = [Function("weather", None, CITY), Function("math.add", "Adds.", {"properties": {"a": {"type": "boolean"}}, "required": ["a"]})]


@pytest.fixture(scope="module")
def ask():
    """Answers to one prompt, hot, a seed each."""
    model = mj.load()
    tokenizer = Tokenizer.from_directory(model.directory)
    engine = Engine(model, slots=4, max_length=512)

    def answers(chosen, form: Grammar | None = None) -> list[Answer]:
        grammar = form_of(chosen, form)
        ids = tokenizer.encode("What is the sum?")
        requests = [
            Request(ids=ids, max_new_tokens=200, grammar=grammar, sampling=Sampling(temperature=2.0, seed=seed)) for seed in range(4)
        ]
        found = [Answer(handle, tokenizer, (), chosen) for handle in engine.run(requests)]
        for answer in found:
            answer.read()
        return found

    return answers


def check(call: Call) -> None:
    function = next(function for function in FUNCTIONS if function.name == call.name)
    jsonschema.validate(json.loads(call.arguments), function.parameters)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_call_that_is_required_comes(ask, parallel):
    """Of either tool; the text is empty, and where one call is wanted there is one."""
    for answer in ask(tools(FUNCTIONS, "required", parallel=parallel)):
        assert answer.text == ""
        calls = [part for part in answer.said if isinstance(part, Call)]
        assert len(calls) == 1 or (parallel and len(calls) > 1)
        if answer.finish == "tool_calls":
            for call in calls:
                check(call)
        else:
            assert (parallel, answer.finish) == (True, "length")  # it went on calling


def test_a_tool_by_its_name(ask):
    """The other one is known to the model, and cannot come."""
    for answer in ask(tools(FUNCTIONS, "required", ["weather"], parallel=False)):
        (call,) = answer.said
        assert answer.finish == "tool_calls"
        assert call.name == "weather"
        check(call)


def test_a_form_or_a_call(ask):
    """An answer that has a form may still call."""
    chosen = tools(FUNCTIONS, "auto", parallel=False)
    schema = {"type": "object", "properties": {"sum": {"type": "boolean"}}, "required": ["sum"], "additionalProperties": False}
    for answer in ask(chosen, Grammar(json_schema=schema)):
        if answer.finish == "tool_calls":
            check(*answer.said)
        else:
            jsonschema.validate(json.loads(answer.text), schema)


def test_who_may_call_freely_has_no_form():
    """Nor does an answer that shall not call; a choice of texts is the whole answer."""
    chosen, form = tools(FUNCTIONS, "auto"), Grammar(choice=["a", "b"])
    assert form_of(chosen, None) is None
    assert form_of(chosen, form) == form_of(tools(FUNCTIONS, "none"), form) == form
    assert "call_1" in form_of(tools(FUNCTIONS, "required"), form).text
