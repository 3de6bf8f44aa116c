"""Grammars in the engine: an answer has its form whatever the model likes, beside others that have none."""

import json

import pytest

import maverick_jax as mj
from maverick_jax.errors import UserError
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.grammar import Grammar
from maverick_jax.inference.request import Finish, Request
from maverick_jax.inference.sampling import Sampling
from maverick_jax.prompt import Tokenizer
from oracle.plain import plain_model

pytest.importorskip("llguidance", reason="llguidance, of the extra `grammar`, is not installed")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"]}


@pytest.fixture(scope="module")
def model():
    return mj.load(dtype="float32")


@pytest.mark.parametrize("draft", [0, 3])
def test_every_answer_has_its_form(model, draft):
    """A schema, an expression, a choice and two requests without any, drawn hot: with drafts and without the tokens are the same."""
    tokenizer = Tokenizer.from_directory(model.directory)
    hot = [Sampling(temperature=2.0, seed=seed) for seed in range(5)]
    forms = [Grammar(json_schema=SCHEMA), Grammar(regex="[0-9]{3}-[a-f]+z"), Grammar(choice=["left", "right"]), None, None]
    ids = tokenizer.encode("What is the answer?")
    asked = [Request(ids=ids, max_new_tokens=60, sampling=s, grammar=form) for s, form in zip(hot, forms, strict=True)]
    engine = Engine(model, slots=4, max_length=128, draft=draft)
    handles = engine.run(asked)
    as_object, expression, choice, free, other = (tokenizer.decode(handle.tokens) for handle in handles)
    parsed = json.loads(as_object)
    assert isinstance(parsed["a"], int)
    assert parsed["b"] in ("x", "y")
    head, _, tail = expression.partition("-")
    assert head.isdigit() and len(head) == 3  # noqa: PT018
    assert handles[1].finish is not Finish.STOP or (tail[-1] == "z" and set(tail[:-1]) <= set("abcdef"))
    assert choice in ("left", "right")
    assert [handle.finish for handle in handles[::2][:2]] == [Finish.STOP] * 2
    alone = Engine(model, slots=4, max_length=128)
    assert [handle.tokens for handle in alone.run(asked[3:])] == [handles[3].tokens, handles[4].tokens]
    assert free != other
    assert engine._serving.scheduler.idle


def test_what_no_answer_can_have(model):
    """It is told when the request comes, and the engine goes on; a model without a tokenizer has no grammar."""
    engine = Engine(model, slots=1, max_length=64)
    for form, said in ((dict(json_schema={"type": "nothing"}), "json_schema"), (dict(regex="("), "regex")):
        with pytest.raises(UserError, match=said):
            engine.submit(Request(ids=[1], max_new_tokens=4, grammar=Grammar(**form)))
    assert engine.run(
        [
            Request(
                ids=[1],
                max_new_tokens=4,
            )
        ]
    )[0].finish
    with pytest.raises(UserError, match="was not loaded from a directory"):
        Engine(plain_model(num_hidden_layers=2), slots=1).submit(Request(ids=[1], max_new_tokens=4, grammar=Grammar(regex="a")))
