"""Anthropic's messages: blocks in, blocks out, the events of a stream, and errors in their own form."""

import base64
import io
import json

import pytest
from PIL import Image

from maverick_jax.serving.dialects import messages
from oracle.scripted_engine import ScriptedEngine

URL = "/v1/messages"
TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
SAID = 'Let me see.\n{"name": "weather", "parameters": {"city": "Rome"}}'
HELLO = {"max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]}


def test_a_text(serve):
    """A system message of blocks, fields of other servers, and an answer with what it cost."""
    engine = ScriptedEngine(lambda prompt: "Hello!")
    body = {
        **HELLO,
        "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        "thinking": {"type": "adaptive"},
    }
    message = serve(engine).post(f"{URL}?beta=true", body | {"context_management": {}, "output_config": {"effort": "high"}}).body
    assert (message["type"], message["role"], message["stop_reason"], message["stop_sequence"]) == (
        "message",
        "assistant",
        "end_turn",
        None,
    )
    assert message["content"] == [{"type": "text", "text": "Hello!"}]
    assert message["usage"] == {
        "input_tokens": len(engine.seen[0].ids), "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 6,
    }  # fmt: skip


def test_the_events_of_a_stream(serve):
    """Each block is opened, written and closed; put together it is what comes whole."""
    client = serve(ScriptedEngine(lambda prompt: SAID))
    events = list(client.events(URL, {**HELLO, "tools": [TOOL]}))
    kinds = [event["type"] for event in events]
    assert list(dict.fromkeys(kinds)) == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    blocks: list[dict] = []
    opened = False
    for event in events:
        if event["type"] == "content_block_start":
            assert (event["index"], opened) == (len(blocks), False)
            blocks.append(dict(event["content_block"], json=""))
            opened = True
        elif event["type"] == "content_block_delta":
            assert (event["index"], opened) == (len(blocks) - 1, True)
            blocks[-1]["json"] += event["delta"].get("partial_json", "")
            if "text" in event["delta"]:
                blocks[-1]["text"] += event["delta"]["text"]
        elif event["type"] == "content_block_stop":
            opened = False
    whole = client.post(URL, {**HELLO, "tools": [TOOL]}).body
    assert [block["type"] for block in whole["content"]] == ["text", "tool_use"]
    assert whole["stop_reason"] == events[-2]["delta"]["stop_reason"] == "tool_use"
    assert blocks[0]["text"] == whole["content"][0]["text"] == "Let me see.\n"
    assert json.loads(blocks[1]["json"]) == whole["content"][1]["input"] == {"city": "Rome"}
    assert blocks[1]["name"] == whole["content"][1]["name"] == "weather"
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_calls_and_what_they_gave_come_back():
    """Results are messages of tools in front of what the user says, a picture among them is the user's; other models' thoughts go."""
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    picture = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(stream.getvalue()).decode()},
    }
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    use = {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "cold"}, picture]}
    given = [
        {"role": "user", "content": [picture, {"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": [thought, {"type": "text", "text": "I look."}, use],
        },
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": "It is"},
    ]
    job = messages.read({"max_tokens": 5, "messages": given, "stop_sequences": ["."]})
    assert [message["role"] for message in job.messages] == ["user", "assistant", "tool", "user", "assistant"]
    assert job.messages[0]["content"][0]["image"] == stream.getvalue()
    assert job.messages[1]["content"] == [{"type": "text", "text": "I look."}]
    assert job.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert job.messages[2] == {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "cold"}]}
    assert [part["type"] for part in job.messages[3]["content"]] == ["image", "text"]
    assert (job.render, job.stop) == ({"continue_final_message": True}, (".",))


def test_why_it_ended(serve):
    """At its limit, and at a text of its own, which is named."""
    client = serve("one, two, three")
    assert client.post(URL, HELLO | {"max_tokens": 3}).body["stop_reason"] == "max_tokens"
    message = client.post(URL, HELLO | {"stop_sequences": ["nine", ", t"]}).body
    assert (message["content"][0]["text"], message["stop_reason"], message["stop_sequence"]) == ("one", "stop_sequence", ", t")
    assert list(client.events(URL, HELLO | {"stop_sequences": [", t"]}))[-2]["delta"]["stop_sequence"] == ", t"


def test_how_many_tokens_it_would_be(serve):
    """Without an answer, and so without a limit for it."""
    engine = ScriptedEngine(lambda prompt: "Hello!")
    client = serve(engine)
    counted = client.post(f"{URL}/count_tokens", {"messages": HELLO["messages"], "tools": [TOOL]}).body
    client.post(URL, HELLO | {"tools": [TOOL]})
    assert counted == {"input_tokens": len(engine.seen[0].ids)}


@pytest.mark.parametrize(
    "body, status, kind, says",
    [
        ({"messages": HELLO["messages"]}, 400, "invalid_request_error", "max_tokens is missing"),
        ({"max_tokens": 5}, 400, "invalid_request_error", "messages has none"),
        ({**HELLO, "messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_request_error", "messages holds"),
        ({**HELLO, "model": "claude-9"}, 404, "not_found_error", "here is mini, other-name"),
        ({**HELLO, "tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice asks for a call"),
        ({**HELLO, "tool_choice": {"type": "all"}}, 400, "invalid_request_error", "tool_choice has the type 'all'"),
        ({**HELLO, "system": 5}, 400, "invalid_request_error", "system is 5"),
        ({**HELLO, "system": {}}, 400, "invalid_request_error", "system is {}"),
        (
            {**HELLO, "messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": 5}]}]},
            400,
            "invalid_request_error",
            "a tool_result has the content 5",
        ),
        ({**HELLO, "tools": [None]}, 400, "invalid_request_error", "tools holds None"),
        ({**HELLO, "messages": [{"role": "user"}]}, 400, "invalid_request_error", "messages holds"),
        ({**HELLO, "messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400, "invalid_request_error", "a content holds"),
        (b"{", 400, "invalid_request_error", "not valid JSON"),
        (b"x" * (2 << 20), 413, "request_too_large", "more than"),
    ],
)
def test_what_is_wrong(serve, body, status, kind, says):
    """In Anthropic's form."""
    answer = serve("yes", longest=1 << 20).post(URL, body)
    assert answer.status == status
    assert (answer.body["type"], answer.body["error"]["type"]) == ("error", kind)
    assert says in answer.body["error"]["message"]


def test_a_key_that_is_missing(serve, monkeypatch):
    """Also in its form, and so is an address that there is not."""
    from maverick_jax.serving.http.keys import VARIABLE, Keys

    monkeypatch.setenv(VARIABLE, "one")
    client = serve("yes", keys=Keys())
    assert client.post(URL, HELLO).body["error"]["type"] == "authentication_error"
    assert client.post(URL, HELLO, x_api_key="one").status == 200
    assert client.get(URL, x_api_key="one").body["type"] == "error"
