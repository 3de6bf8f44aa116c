"""Grammars in the engine: an answer has its form whatever the model likes, beside others that have none."""

import json

import pytest

import maverick_jax as mj
from maverick_jax.errors import UserError
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.followers import Leader
from maverick_jax.inference.grammar import Grammar
from maverick_jax.inference.request import Finish, Request
from maverick_jax.inference.sampling import Sampling
from maverick_jax.prompt import Tokenizer
from maverick_jax.sharding import multihost
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
    assert engine.run([Request(ids=[1], max_new_tokens=4)])[0].finish
    with pytest.raises(UserError, match="was not loaded from a directory"):
        Engine(plain_model(num_hidden_layers=2), slots=1).submit(Request(ids=[1], max_new_tokens=4, grammar=Grammar(regex="a")))


def test_a_form_keeps_nobody_waiting(model):
    """The next step is launched before the token is read that its mask is made of; the mask and the draw come behind it."""
    engine, launched = Engine(model, slots=2, max_length=64), []
    forward, deliver = engine._serving.runner.forward, engine._serving.deliver
    engine._serving.runner.forward = lambda *args: launched.append("forward") or forward(*args)
    engine._serving.deliver = lambda drawn: launched.append(len(drawn)) or deliver(drawn)
    forms = (Grammar(regex="[0-9]{9}"), None)
    handles = [engine.submit(Request(ids=[65 + i] * 5, max_new_tokens=6, stop_ids=(), grammar=form)) for i, form in enumerate(forms)]
    engine.step()
    assert launched == ["forward", 0]
    assert [handle.new_tokens for handle in handles] == [0, 0]
    engine.step()
    assert launched[2:] == ["forward", 2]
    engine.run([])
    for handle in handles:
        assert len(list(handle)) == 6
    assert Tokenizer.from_directory(model.directory).decode(handles[0].tokens).isdigit()


def test_one_that_is_cancelled_before_its_mask_is_made(model):
    """While the tokens are read that its mask waits for; who takes its place next, and who stands beside it, do not notice."""
    free = [Request(ids=[70 + i] * 5, max_new_tokens=8, stop_ids=(), sampling=Sampling(temperature=1.0, seed=i)) for i in range(2)]
    alone = [handle.tokens for handle in Engine(model, slots=1, max_length=64).run(free)]
    engine = Engine(model, slots=2, max_length=64)
    held = engine.submit(Request(ids=[65] * 5, max_new_tokens=20, grammar=Grammar(regex="[0-9]{30}")))
    beside = engine.submit(free[0])
    for _ in range(3):
        engine.step()
    launch = engine._serving.launch

    def launch_and_cancel(*args):
        result = launch(*args)
        held.cancel()
        return result

    engine._serving.launch = launch_and_cancel
    engine.step()
    engine._serving.launch = launch
    assert held.finish is Finish.CANCELLED
    after = engine.submit(free[1])
    assert [list(beside), list(after)] == alone
    engine._serving.scheduler.check()
    assert not engine._serving.busy


def test_followers_are_told_before_all_draw(model, monkeypatch):
    """Draws that waited for a mask are computed on all devices."""
    engine, events = Engine(model, slots=1, max_length=64), []
    monkeypatch.setattr(multihost, "exchange", lambda message: events.extend(name for event in message for name in event))
    engine._leader, draw = Leader(), engine._serving.runner.draw
    engine._serving.runner.draw = lambda *args: events.append("drawn") or draw(*args)
    engine.submit(Request(ids=[65], max_new_tokens=4, grammar=Grammar(regex="[0-9]{9}")))
    engine.step()
    assert events[-2:] == ["deliver", "drawn"]
