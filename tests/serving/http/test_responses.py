"""OpenAI's responses: items in, items out, and the events of a stream in their order."""

import json

import pytest

from oracle.scripted_engine import ScriptedEngine

URL = "/v1/responses"
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
SAID = 'Let me see.\n[weather(city="Rome"), weather(city="Oslo")]'


def test_a_text(serve):
    """Instructions and a text in; one message out, with what it cost."""
    engine = ScriptedEngine(lambda prompt: "Hello!")
    body = {"model": "mini", "instructions": "Be kind.", "input": "Hi", "store": False, "include": ["reasoning.encrypted_content"]}
    response = serve(engine).post(URL, body).body
    assert (response["object"], response["status"], response["error"], response["store"]) == ("response", "completed", None, False)
    (message,) = response["output"]
    assert (message["type"], message["role"], message["content"][0]["text"]) == ("message", "assistant", "Hello!")
    assert response["usage"]["total_tokens"] == response["usage"]["input_tokens"] + response["usage"]["output_tokens"]
    assert response["instructions"] == "Be kind."


def test_the_events_of_a_stream(serve):
    """Each item is opened, written and closed before the next one; the last event is what comes whole."""
    engine = ScriptedEngine(lambda prompt: SAID)
    client = serve(engine)
    events = list(client.events(URL, {"input": "Weather?", "tools": [TOOL]}))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    firsts = list(dict.fromkeys(kinds))
    assert firsts == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done", "function_call_arguments.delta", "function_call_arguments.done", "completed",
    ]  # fmt: skip
    opened = None
    for event, kind in zip(events, kinds, strict=True):
        if kind == "output_item.added":
            assert opened is None
            opened = event["item"]["id"]
        elif kind == "output_item.done":
            assert event["item"]["id"] == opened
            opened = None
        elif "item_id" in event:
            assert event["item_id"] == opened
    output = events[-1]["response"]["output"]
    text = "".join(event["delta"] for event, kind in zip(events, kinds, strict=True) if kind == "output_text.delta")
    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    assert output[0]["content"][0]["text"] == text == "Let me see.\n"
    assert [(item["name"], json.loads(item["arguments"])["city"]) for item in output[1:]] == [("weather", "Rome"), ("weather", "Oslo")]
    arguments = {}
    for event, kind in zip(events, kinds, strict=True):
        if kind == "function_call_arguments.delta":
            arguments[event["item_id"]] = arguments.get(event["item_id"], "") + event["delta"]
    assert arguments == {item["id"]: item["arguments"] for item in output[1:]}
    whole = client.post(URL, {"input": "Weather?", "tools": [TOOL]}).body["output"]
    for one, other in zip(whole, output, strict=True):
        same = {key for key in one if key not in ("id", "call_id")}
        assert {key: one[key] for key in same} == {key: other[key] for key in same}


def test_calls_and_what_they_gave_come_back(serve):
    """Calls that follow each other are one message; a picture is one; what is of another server is passed over."""
    engine = ScriptedEngine(lambda prompt: "Cold.")
    call = {"type": "function_call", "name": "weather", "arguments": '{"city": "Oslo"}'}
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "summary": []},
        {**call, "call_id": "1"},
        {**call, "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "cold"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "snow"}]},
    ]
    from maverick_jax.serving.dialects import responses

    messages = responses.read({"input": items}).messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "tool"]
    assert [call["function"]["arguments"] for call in messages[2]["tool_calls"]] == [{"city": "Oslo"}] * 2
    tools = [TOOL, {"type": "web_search"}, {"type": "namespace", "name": "x", "tools": []}]
    assert serve(engine).post(URL, {"input": items, "tools": tools}).body["status"] == "completed"


def test_an_answer_that_was_cut_off(serve):
    """It is incomplete, and says why."""
    engine = ScriptedEngine(lambda prompt: "x" * 50)
    client = serve(engine)
    response = client.post(URL, {"input": "x", "max_output_tokens": 5}).body
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert list(client.events(URL, {"input": "x", "max_output_tokens": 5}))[-1]["type"] == "response.incomplete"


def test_a_form(mini):
    """Of `text.format`, as `parse` sends it."""
    schema = {"type": "object", "properties": {"sum": {"type": "boolean"}}, "required": ["sum"], "additionalProperties": False}
    wanted = {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": schema}}
    (message,) = mini.post(URL, {"input": "What is the sum?", "text": wanted}).body["output"]
    assert isinstance(json.loads(message["content"][0]["text"])["sum"], bool)


@pytest.mark.parametrize(
    "body, says",
    [
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id is given"),
        ({"input": "x", "conversation": "c"}, "conversation is given"),
        ({}, "input is None"),
        ({"input": []}, r"input is []"),
        ({"input": [5]}, "input holds 5"),
        ({"input": [{"type": "reasoning"}]}, "input has no message"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]}, "no JSON"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format is"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice asks for a call"),
        ({"input": "x", "stream": "yes"}, "stream is 'yes'"),
    ],
)
def test_what_is_wrong(serve, body, says):
    """In OpenAI's form."""
    answer = serve("yes").post(URL, body)
    assert answer.status == 400
    assert says in answer.error["message"]


def test_a_stream_that_fails(serve):
    """Its last event says so."""
    from maverick_jax.errors import UserError

    events = list(serve(ScriptedEngine(lambda prompt: UserError("not finite"))).events(URL, {"input": "x"}))
    assert events[-1]["type"] == "response.failed"
    assert "not finite" in events[-1]["response"]["error"]["message"]
