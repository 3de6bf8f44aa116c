"""What clients get of the mini model: the answers that it gives offline, whole and streamed."""

import base64
import io
import json

import jax
import numpy as np
import pytest

import maverick_jax as mj
from maverick_jax.assets.digits import held_out, picture
from maverick_jax.inference.request import Finish
from oracle.http_client import choices_of, until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "What is the sum?"}]
COLD = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def chat(engine):
    """The same model offline."""
    return mj.Chat(engine.model, max_new_tokens=12)


def test_a_chat_is_what_it_is_offline(mini, chat):
    """Whole, streamed, and among others."""
    answer = mini.post(CHAT, {"model": "mini", "messages": HELLO, **COLD})
    assert answer.status == 200
    (choice,) = answer.body["choices"]
    chat.reset()
    assert choice["message"] == {"role": "assistant", "content": chat("What is the sum?"), "refusal": None}
    events = list(mini.events(CHAT, {"messages": HELLO, **COLD, "stream_options": {"include_usage": True}}))
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    (streamed,) = choices_of(events)
    assert (streamed["text"], streamed["finish_reason"]) == (choice["message"]["content"], choice["finish_reason"])
    assert events[-2]["choices"] == []
    usage = {**events[-2]["usage"], "prompt_tokens_details": None}
    assert usage == {**answer.body["usage"], "prompt_tokens_details": None}
    assert events[-2]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert all("usage" not in event for event in events[:-2])


def test_a_question_about_two_pictures(mini, chat):
    """They come as bytes in an address, or as files."""
    pictures = [picture(pixels) for pixels in held_out()[0][:2]]
    urls = []
    for image in pictures:
        stream = io.BytesIO()
        image.save(stream, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(stream.getvalue()).decode())
    parts = [
        {"type": "image_url", "image_url": {"url": urls[0], "detail": "high"}},
        {"type": "file", "file": {"filename": "right.png", "file_data": urls[1]}},
        {"type": "text", "text": "What is the sum?"},
    ]
    answer = mini.post(CHAT, {"messages": [{"role": "user", "content": parts}], **COLD})
    chat.reset()
    assert answer.body["choices"][0]["message"]["content"] == chat("What is the sum?", images=pictures)


def test_streams_are_what_comes_whole(mini):
    """Several answers, drawn by a seed, with log-probabilities, token ids and a stop text."""
    settings = {"max_tokens": 20, "seed": 3, "n": 3, "return_token_ids": True, "stop": "="}
    whole = mini.post(CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 2, **settings}).body
    streamed = choices_of(list(mini.events(CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 2, **settings})))
    assert len({choice["message"]["content"] for choice in whole["choices"]}) > 1
    for one, other in zip(whole["choices"], streamed, strict=True):
        assert (one["message"]["content"], one["finish_reason"]) == (other["text"], other["finish_reason"])
        assert one["logprobs"]["content"] == other["logprobs"]
        assert one["token_ids"] == other["token_ids"]
        assert len(one["token_ids"]) == len(other["logprobs"]) > 0
    assert whole["prompt_token_ids"][0] == 313
    whole = mini.post(COMPLETIONS, {"prompt": ["What is", "Which"], "logprobs": 1, "echo": False, **settings}).body
    streamed = choices_of(list(mini.events(COMPLETIONS, {"prompt": ["What is", "Which"], "logprobs": 1, **settings})))
    assert len(whole["choices"]) == 6
    for one, other in zip(whole["choices"], streamed, strict=True):
        assert (one["text"], one["finish_reason"]) == (other["text"], other["finish_reason"])
        for name, values in one["logprobs"].items():
            assert values == [value for part in other["logprobs"] for value in part[name]]


def test_echo(mini):
    """The prompt stands in front, once."""
    body = {"prompt": "What is", "echo": True, **COLD}
    whole = mini.post(COMPLETIONS, body).body["choices"][0]["text"]
    (streamed,) = choices_of(list(mini.events(COMPLETIONS, body)))
    assert whole == streamed["text"]
    assert whole.startswith("What is")


def test_how_likely_a_prompt_is(mini, engine):
    """As lm-eval asks for it: token ids, echoed, with the log-probability of each; and in vLLM's own field, streamed too."""
    ids = mini.post("/tokenize", {"prompt": "What is the sum?"}).body["tokens"]
    body = {"prompt": [ids, ids[:4]], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    choices = mini.post(COMPLETIONS, body).body["choices"]
    logits = np.asarray(jax.nn.log_softmax(engine.model(np.array([ids])), axis=-1))[0]
    for choice, prompt in zip(choices, (ids, ids[:4]), strict=True):
        found = choice["logprobs"]
        assert {len(values) for values in found.values()} == {len(prompt) + 1}
        assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
        expected = [logits[i, token] for i, token in enumerate(prompt[1:])]
        np.testing.assert_allclose(found["token_logprobs"][1:-1], expected, atol=0.05)  # bfloat16
        for own, top, name in list(zip(found["token_logprobs"], found["top_logprobs"], found["tokens"], strict=True))[1:]:
            assert top[name] == own <= max(top.values())
    streamed = [event["choices"][0] for event in list(mini.events(COMPLETIONS, body | {"prompt": ids}))[:-1]]
    joined = [value for part in streamed for value in part["logprobs"]["token_logprobs"]]
    np.testing.assert_allclose(joined[1:], choices[0]["logprobs"]["token_logprobs"][1:], atol=0.05)
    (scores,) = [choice["prompt_logprobs"] for choice in mini.post(COMPLETIONS, {"prompt": ids, "prompt_logprobs": 2}).body["choices"]]
    assert (scores[0], len(scores)) == (None, len(ids))
    assert all(str(token) in score for token, score in zip(ids[1:], scores[1:], strict=True))
    assert [entry["rank"] for entry in scores[3].values()][:2] == [1, 2]
    told = mini.post(CHAT, {"messages": HELLO, "max_tokens": 1, "prompt_logprobs": 0}).body
    assert len(told["prompt_logprobs"]) == told["usage"]["prompt_tokens"]


def test_a_longer_answer_than_there_is_room_for(mini):
    """Agents ask for 32,000 tokens of everyone."""
    answer = mini.post(CHAT, {"messages": HELLO, "max_tokens": 32000, "ignore_eos": True, "temperature": 0})
    assert answer.body["choices"][0]["finish_reason"] == "length"
    assert answer.body["usage"]["total_tokens"] == 512


def test_a_call_that_is_required(mini):
    """Streamed argument by argument it is the one that comes whole."""
    parameters = {"type": "object", "properties": {"left": {"type": "boolean"}, "right": {"enum": [1, 2]}}, "required": ["left", "right"]}
    tools = [{"type": "function", "function": {"name": "add", "parameters": parameters}}]
    body = {"messages": HELLO, "tools": tools, "tool_choice": {"type": "function", "function": {"name": "add"}}, "temperature": 0}
    (choice,) = mini.post(CHAT, body).body["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["message"]["content"], choice["finish_reason"], call["function"]["name"]) == (None, "tool_calls", "add")
    arguments = json.loads(call["function"]["arguments"])
    assert isinstance(arguments["left"], bool)
    assert arguments["right"] in (1, 2)
    (streamed,) = choices_of(list(mini.events(CHAT, body)))
    assert (streamed["text"], streamed["finish_reason"]) == ("", "tool_calls")
    assert (streamed["calls"][0]["name"], streamed["calls"][0]["arguments"]) == ("add", call["function"]["arguments"])
    result = {"role": "tool", "tool_call_id": call["id"], "content": "3"}
    again = mini.post(CHAT, {"messages": [*HELLO, choice["message"], result], "tools": tools, **COLD})
    assert again.status == 200


def test_a_form(mini):
    """By a schema, and by vLLM's expression."""
    schema = {"type": "object", "properties": {"sum": {"type": "boolean"}}, "required": ["sum"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    content = mini.post(CHAT, {"messages": HELLO, "response_format": wanted}).body["choices"][0]["message"]["content"]
    assert isinstance(json.loads(content)["sum"], bool)
    content = mini.post(COMPLETIONS, {"prompt": "x", "structured_outputs": {"choice": ["left", "right"]}}).body["choices"][0]["text"]
    assert content in ("left", "right")


def test_who_goes_away_costs_nothing_more(mini, engine):
    """In the midst of a stream, and while a whole answer is computed: slot and pages are free at once."""
    for stream in (True, False):
        with mini.connect(request_of({"prompt": "What", "max_tokens": 400, "ignore_eos": True, "stream": stream})) as connection:
            until(lambda: engine._serving.by_number)
            (served,) = engine._serving.by_number.values()
            if stream:
                assert b"data: {" in connection.recv(4096) + connection.recv(4096)
        until(lambda handle=served.handle: handle.finish)
        assert served.handle.finish is Finish.CANCELLED
    engine._serving.scheduler.check()


def request_of(body: dict, path: str = COMPLETIONS) -> bytes:
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nhost: here\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data


def test_what_the_server_is(mini):
    """The model's names and length, the version, tokens of texts and conversations, and back."""
    models = mini.get("/v1/models").body
    assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [("mini", 512), ("other-name", 512)]
    assert mini.get("/v1/models/other-name").body["object"] == "model"
    assert mini.get("/v1/models/x").error["code"] == "model_not_found"
    assert (mini.get("/health").status, mini.get("/ping").status) == (200, 200)
    assert mini.get("/version").body == {"version": mj.__version__}
    found = mini.post("/tokenize", {"prompt": "What is", "return_token_strs": True}).body
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert "".join(found["token_strs"]) == "<|begin_of_text|>What is"
    assert mini.post("/tokenize", {"prompt": "What is", "add_special_tokens": False}).body["tokens"] == found["tokens"][1:]
    assert mini.post("/detokenize", {"tokens": found["tokens"]}).body == {"prompt": "<|begin_of_text|>What is"}
    asked = {"messages": HELLO, "max_tokens": 1, "return_token_ids": True}
    assert mini.post("/tokenize", {"messages": HELLO}).body["tokens"] == mini.post(CHAT, asked).body["prompt_token_ids"]
    info = mini.get("/tokenizer_info").body
    assert (info["bos_token"], info["eos_token"]) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert "<|header_start|>" in info["chat_template"]
