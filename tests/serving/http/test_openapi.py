"""The server's description of itself is true, and whatever is sent to it, by description or against it, gets a clear answer."""

import json
import random

import pytest

from maverick_jax.serving import fields as fields_module
from maverick_jax.serving.dialects import chat, completions, messages, responses
from maverick_jax.serving.http.openapi import BODIES
from maverick_jax.serving.settings import IGNORED
from oracle.scripted_engine import ScriptedEngine

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
TEXT = {"type": "text", "text": "x"}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
GOOD = {
    chat.URL: {
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [TEXT]}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["."],
        "logit_bias": {"5": 1.0},
        "n": 2,
        "max_tokens": 3,
    },
    completions.URL: {"prompt": ["x", [5, 6]], "max_tokens": 3, "echo": True, "seed": 5, "temperature": 0.5, "stop_token_ids": [5]},
    responses.URL: {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}, CALL],
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
        "text": {"format": {"type": "text"}},
        "max_output_tokens": 3,
        "stream": True,
    },
    messages.URL: {
        "messages": [{"role": "user", "content": [TEXT, {"type": "tool_result", "tool_use_id": "1", "content": "y"}]}],
        "system": [TEXT],
        "max_tokens": 3,
        "tools": [{"name": "f", "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto"},
        "stop_sequences": ["."],
        "stream": True,
    },
    f"{messages.URL}/count_tokens": {"messages": HELLO, "system": "x"},
    "/tokenize": {"messages": HELLO, "return_token_strs": True},
    "/detokenize": {"tokens": [5, 6]},
}
ODD = [None, True, 0, -1, 1.5, 2**70, 1e308, "", "x", "\ud800", "<|eot|>", "x" * 1000, [], {}, [[]], [{}], [None], {"": None}, {"type": 5}]


@pytest.mark.parametrize("dialect", [chat, completions, responses, messages], ids=lambda dialect: dialect.URL)
def test_every_field_that_is_read_is_described(dialect, monkeypatch):
    """And nothing else, but for what has no effect."""
    known = {}
    init = fields_module.Fields.__init__

    def noting(self, values, name):
        init(self, values, name)
        known[name] = self._known

    monkeypatch.setattr(fields_module.Fields, "__init__", noting)
    dialect.read(GOOD[dialect.URL])
    described = set(BODIES[dialect.URL]["properties"])
    silent = IGNORED | set(getattr(dialect, "IGNORED", ())) | set(getattr(dialect, "REPEATED", ())) | set(getattr(dialect, "STATELESS", ()))
    silent |= {"include", "client_metadata", "stream_options"} if dialect is responses else set()
    assert described <= known[dialect.URL]
    assert known[dialect.URL] - silent <= described


def test_it_is_told(serve):
    """Each address that it names is there."""
    client = serve("yes")
    told = client.get("/openapi.json").body
    assert told["openapi"].startswith("3.1")
    for path, operations in told["paths"].items():
        for method in operations:
            assert client.ask(method.upper(), path, GOOD.get(path)).status == 200, path


def mutated(value, chance: random.Random):
    """The value with something in it replaced, taken away, doubled, or put somewhere else."""
    value = json.loads(json.dumps(value))
    places, todo = [], [value]
    while todo:
        inner = todo.pop()
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        places += [(inner, key) for key in keys]
        todo += [inner[key] for key in keys if isinstance(inner[key], dict | list)]
    for _ in range(chance.choice([1, 1, 2, 3])):
        holder, key = chance.choice(places)
        match chance.randrange(4):
            case 0 if isinstance(holder, dict):
                holder.pop(key, None)
            case 1 if isinstance(holder, list):
                holder.append(chance.choice(ODD))
            case 2:
                other, where = chance.choice(places)
                holder[key] = json.loads(json.dumps(other.get(where) if isinstance(other, dict) else (other or [None])[-1]))
            case _:
                if isinstance(holder, dict) or key < len(holder):
                    holder[key] = chance.choice(ODD)
    return value


def bytes_of(value, chance: random.Random) -> bytes:
    """As JSON, or cut and stirred."""
    data = json.dumps(value).encode()
    if chance.random() < 0.15:
        data = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            if data:
                place = chance.randrange(len(data))
                data[place : place + chance.randrange(3)] = bytes([chance.randrange(256)])
    return bytes(data)


@pytest.mark.parametrize("path", GOOD)
def test_bodies_at_random(serve, path):
    """Of each address: 200, or a 4xx in its form; never a traceback, and nothing is left running."""
    chance = random.Random(path)
    engine = ScriptedEngine(lambda prompt: "[f(a=1)] and more")
    client = serve(engine)
    seen = set()
    for _ in range(1500):
        answer = client.post(path, bytes_of(mutated(GOOD[path], chance), chance))
        seen.add(answer.status)
        assert answer.status == 200 or 400 <= answer.status < 500, answer
        if answer.status != 200:
            message = answer.body["error"]["message"] if path.startswith(messages.URL) else answer.error["message"]
            assert 0 < len(message) < 3000
    assert seen >= {200, 400}
