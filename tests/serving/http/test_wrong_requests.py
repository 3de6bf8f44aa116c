"""What is wrong with a request is said in OpenAI's form, in one line that names the field; and the server goes on."""

import base64
import io
import json

import pytest
from PIL import Image

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "What is the sum?"}]


def with_picture(url, count: int = 1) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}] * count}]}


def png(width: int, height: int) -> str:
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


WRONG = {
    "broken JSON": (CHAT, b'{"messages": [', "the body is not valid JSON", None),
    "no UTF-8": (CHAT, b'{"messages": "\xff"}', "the body is not valid JSON", None),
    "nothing": (CHAT, b"", "the body is not valid JSON", None),
    "nested too deep": (CHAT, b"[" * 100_000, "the body is not valid JSON", None),
    "a list": (CHAT, b"[]", "is []: expected a JSON object", None),
    "a million values": (CHAT, b"[" + b"0," * 1_100_000 + b"0]", "values, more than", None),
    "no messages": (CHAT, {}, "messages has none", "messages"),
    "a text for messages": (CHAT, {"messages": "x"}, "messages is 'x'", "messages"),
    "an unknown role": (CHAT, {"messages": [{"role": 5}]}, "messages holds", "messages"),
    "a text for a number": (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature is 'hot'", "temperature"),
    "a number out of range": (CHAT, {"messages": HELLO, "top_p": 2}, "top_p is 2", "top_p"),
    "a flag for a number": (CHAT, {"messages": HELLO, "max_tokens": True}, "max_tokens is True", "max_tokens"),
    "half a character": (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a character", None),
    "no picture": (CHAT, with_picture("data:image/png;base64,AAAA"), "cannot be read as a picture", None),
    "a picture that is no base64": (CHAT, with_picture("data:image/png;base64,é"), "no base64", None),
    "a picture too large": (CHAT, with_picture(png(33_000, 10)), "33000 x 10 pixels", None),
    "too many pictures": (CHAT, with_picture(png(8, 8), 49), "49 pictures: at most 48", None),
    "a picture elsewhere": (CHAT, with_picture("https://example.org/a.png"), "nothing is fetched", None),
    "a schema that cannot be": (
        CHAT,
        {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
        "no answer can be held to this json_schema",
        None,
    ),
    "a tool without a name": (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools holds None", "tools"),
    "a tool that there is not": (
        CHAT,
        {"messages": HELLO, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice names 'f'",
        "tool_choice",
    ),
    "no prompt": (COMPLETIONS, {}, "prompt is None", "prompt"),
    "tokens of another model": (COMPLETIONS, {"prompt": [10**6]}, "token ids outside", "prompt"),
    "no text and no tokens": ("/tokenize", {"prompt": 5}, "prompt is 5", None),
    "no tokens": ("/detokenize", {"tokens": ["x"]}, "tokens holds 'x'", None),
}


@pytest.mark.parametrize(
    "path, body, says",
    [
        ("/tokenize", {}, "prompt is missing"),
        ("/tokenize", {"prompt": 5, "messages": HELLO}, "prompt is 5"),
        ("/tokenize", {"messages": HELLO, "return_token_strs": "yes"}, "return_token_strs is 'yes'"),
        ("/detokenize", {}, "tokens is missing"),
        ("/detokenize", {"tokens": "5"}, "tokens is '5'"),
        ("/detokenize", {"tokens": [-1]}, "token ids outside"),
    ],
)
def test_texts_to_tokens_and_back(mini, path, body, says):
    """What is given is looked at, also where something else decides."""
    answer = mini.post(path, body)
    assert answer.status == 400
    assert says in answer.error["message"]


@pytest.mark.parametrize("path, body, says, field", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(mini, path, body, says, field):
    """Status 400, also where a stream was wanted."""
    answer = mini.post(path, body)
    assert answer.status == 400
    assert says in answer.error["message"]
    assert (answer.error["type"], answer.error["param"]) == ("invalid_request_error", field)
    if isinstance(body, dict):
        assert mini.post(path, body | {"stream": True}).error["message"] == answer.error["message"]


def test_a_prompt_that_is_too_long(mini):
    """It has OpenAI's code, by which agents know that they must shorten it."""
    answer = mini.post(COMPLETIONS, {"prompt": "x " * 1000})
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert "there is room for 512" in answer.error["message"]


def test_a_model_that_there_is_not(mini):
    """Both names that it has are told."""
    answer = mini.post(CHAT, {"model": "gpt-4o", "messages": HELLO})
    assert (answer.status, answer.error["param"], answer.error["code"]) == (404, "model", "model_not_found")
    assert "mini, other-name" in answer.error["message"]


def test_an_address_or_a_method_that_there_is_not(mini):
    """In the same form."""
    assert mini.get("/v1/nothing").status == mini.post("/v1/embeddings", {}).status == 404
    assert mini.get(CHAT).status == 405
    assert "not found" in mini.get("/v1/nothing").error["message"]
    assert mini.get(CHAT).error["type"] == "invalid_request_error"


@pytest.mark.parametrize("how", ["at once", "in chunks"])
def test_a_body_that_is_too_long(serve, how):
    """100 MB are not kept, and the client that sends them all is told why."""
    client = serve("yes", longest=1 << 20)
    body = b"x" * 100_000_000 if how == "at once" else (b"x" * 1_000_000 for _ in range(100))
    with client.send("POST", CHAT, body) as response:
        assert response.status == 413
        assert "more than 1,048,576 bytes" in json.loads(response.read())["error"]["message"]
    assert client.post(COMPLETIONS, {"prompt": "x"}).status == 200


def test_what_nobody_knows_is_passed_over(serve, caplog):
    """Clients send what other servers know; a line for whoever looks for it."""
    client = serve("yes")
    caplog.set_level("DEBUG", logger="maverick.serve")
    tools = [{"type": "web_search"}, {"type": "namespace", "name": "x"}]
    answer = client.post(CHAT, {"messages": HELLO, "max_token": 5, "tools": tools, "store": True, "metadata": {}})
    assert answer.body["choices"][0]["message"]["content"] == "yes"
    said = [record.message for record in caplog.records if record.name == "maverick.serve"]
    assert len(said) == 3
    assert "did you mean max_tokens" in said[-1]


def test_a_stumble_is_no_traceback(serve, monkeypatch, caplog):
    """The client learns that it was the server, the log what it was."""
    from maverick_jax.serving import prepare

    def stumble(*args, **settings):
        raise ZeroDivisionError("by zero, with a secret")

    monkeypatch.setattr(prepare, "render", stumble)
    answer = serve("yes").post(CHAT, {"messages": HELLO})
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert "secret" not in answer.error["message"]
    assert "by zero, with a secret" in caplog.text


def test_an_answer_that_fails(serve):
    """Before its first byte it has a status, within a stream an event."""
    from maverick_jax.errors import UserError
    from oracle.scripted_engine import ScriptedEngine

    client = serve(ScriptedEngine(lambda prompt: UserError("the logits are not finite")))
    assert "not finite" in client.post(CHAT, {"messages": HELLO}).error["message"]
    events = list(client.events(CHAT, {"messages": HELLO}))
    assert "not finite" in events[-2]["error"]["message"]
    assert events[-1] == "[DONE]"
