"""A batch through the engine: every line gets what it would get alone, or an error of its own."""

import base64
import io
import json
import math

import pytest
from PIL import Image

import maverick_jax as mj
from maverick_jax.errors import UserError
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.handle import Handle
from maverick_jax.inference.request import Finish, Request
from maverick_jax.inference.sampling import Sampling
from maverick_jax.serving import logprobs, prepare
from maverick_jax.serving.answer import Answer
from maverick_jax.serving.batch import Requests, Results, serve

ROOM = 128
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "What is the sum?"}]


@pytest.fixture(scope="module")
def model():
    return mj.load()


@pytest.fixture(scope="module")
def engine(model):
    """Fewer slots than lines, and room for two waiting: the queue is full all the time."""
    return Engine(model, slots=2, max_length=ROOM, queue=2)


@pytest.fixture
def batch(engine, tmp_path):
    """Serves bodies, a line each, and returns the results by their custom ids, and the tally."""

    def run(bodies: dict[str, tuple[str, dict] | str], told=lambda tally: None):
        lines = [
            line if isinstance(line, str) else json.dumps({"custom_id": name, "method": "POST", "url": line[0], "body": line[1]})
            for name, line in bodies.items()
        ]
        (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
        requests = Requests(tmp_path / "in.jsonl")
        with Results(tmp_path / "out.jsonl", requests) as results:
            tally = serve(engine, requests, results, model="mini", told=told)
        assert_empty(engine)
        found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len({result["custom_id"] for result in found}) == len(found)
        return {result["custom_id"]: result for result in found}, tally

    return run


def assert_empty(engine: Engine) -> None:
    """Slots, pages and handles: everything came back."""
    engine._serving.scheduler.check()
    assert (engine._serving.scheduler.idle, engine._serving.by_number) == (True, {})


def body(result: dict) -> dict:
    assert (result["error"], result["response"]["status_code"]) == (None, 200), result
    return result["response"]["body"]


def failure(result: dict) -> tuple[int, str | None, str]:
    error = result["response"]["body"]["error"]
    return result["response"]["status_code"], error["code"], error["message"]


def test_every_line_gets_what_it_gets_alone(batch, engine, model):
    """Chats, texts and ids, more than there are slots for; the texts are those of `Chat`."""
    chat = mj.Chat(model, max_new_tokens=8)
    chat.engine = engine
    ids = [model.config.bos_token_id, *chat.tokenizer.encode("Which digit")]
    asked: dict = {f"chat {n}": (CHAT, {"messages": HELLO, "max_tokens": n, "temperature": 0}) for n in (1, 2, 8)}
    asked["texts"] = (COMPLETIONS, {"prompt": ["Which digit", "What"], "max_tokens": 4, "temperature": 0})
    asked["ids"] = (COMPLETIONS, {"prompt": ids, "max_tokens": 4, "temperature": 0})
    asked["echo"] = (COMPLETIONS, {"prompt": ids, "max_tokens": 4, "temperature": 0, "echo": True})
    asked["no end"] = (COMPLETIONS, {"prompt": "Which digit", "temperature": 0, "ignore_eos": True})
    asked["most"] = (COMPLETIONS, {"prompt": ids, "max_tokens": 10**6, "ignore_eos": True})  # as long as there is room
    found, tally = batch(asked)
    whole = chat("What is the sum?")
    choice = body(found["chat 8"])["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": whole, "refusal": None}
    assert body(found["chat 2"])["choices"][0]["finish_reason"] == "length"
    assert whole.startswith(body(found["chat 2"])["choices"][0]["message"]["content"])
    chat.max_new_tokens = 4
    expected = "".join(chat.complete(chat.raw_prompt("Which digit")))
    assert body(found["texts"])["choices"][0]["text"] == body(found["ids"])["choices"][0]["text"] == expected
    assert [choice["index"] for choice in body(found["texts"])["choices"]] == [0, 1]
    assert body(found["echo"])["choices"][0]["text"] == "Which digit" + expected
    most = body(found["most"])
    assert (most["choices"][0]["finish_reason"], most["usage"]["total_tokens"]) == ("length", ROOM)
    assert body(found["no end"])["usage"]["completion_tokens"] == 16  # OpenAI's default for completions
    assert (body(found["ids"])["object"], body(found["chat 1"])["object"]) == ("text_completion", "chat.completion")
    assert body(found["ids"])["usage"]["prompt_tokens"] == len(ids)
    assert (tally.done, tally.failed, tally.skipped) == (8, 0, 0)


def test_answers_to_one_prompt_read_it_once(batch):
    """More of them than may wait. They differ, each is what its seed draws, and a line without one has its own."""
    asked = {"message" + name: (COMPLETIONS, {"prompt": "What is the", "max_tokens": 6, "n": 6} | seed)
             for name, seed in {" a": {"seed": 7}, " b": {"seed": 7}, " c": {}, " d": {}}.items()}  # fmt: skip
    found, tally = batch(asked)
    texts = {name: [choice["text"] for choice in body(result)["choices"]] for name, result in found.items()}
    assert texts["message a"] == texts["message b"]
    assert len(set(texts["message a"])) > 1
    assert texts["message c"] != texts["message d"]
    for result in found.values():
        usage = body(result)["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens"] < 10  # not six times
    assert tally.prompt_tokens == sum(body(result)["usage"]["prompt_tokens"] for result in found.values())
    assert body(found["message d"])["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    again, _ = batch({name: line for name, line in asked.items() if name != "message a"})
    assert again == found  # nothing was done again


def png() -> str:
    stream = io.BytesIO()
    Image.new("L", (28, 28)).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def picture(url: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Which digit?"}]}]


FAILING = {
    "too long": ((COMPLETIONS, {"prompt": "x " * ROOM}), "context_length_exceeded", "shorten it"),
    "a picture elsewhere": ((CHAT, {"messages": picture("https://example.org/a.png")}), None, "nothing is fetched"),
    "ids of another vocabulary": ((COMPLETIONS, {"prompt": [10**6], "n": 3}), None, "token ids outside"),
    "a setting out of its range": ((CHAT, {"messages": HELLO, "temperature": -1}), None, "temperature is -1"),
    "a biased token that there is not": ((CHAT, {"messages": HELLO, "logit_bias": {"1000000": 1}}), None, "logit_bias has token id"),
    "no picture": ((CHAT, {"messages": picture("data:image/png;base64,AAAA")}), None, "picture"),
    "a part that nobody knows": ((CHAT, {"messages": [{"role": "user", "content": [{"type": "video"}]}]}), None, "message part"),
    "a form that nothing has": ((CHAT, {"messages": HELLO, "structured_outputs": {"regex": "(?"}}), None, "no answer can be held to"),
    "echoed ids of another vocabulary": ((COMPLETIONS, {"prompt": [-5], "echo": True}), None, "token ids outside"),
}


def test_what_cannot_be_done_is_the_error_of_its_line(batch):
    """Between lines that are answered, one of them with a picture; a broken line has no name."""
    good = {"first": (CHAT, {"messages": HELLO, "max_tokens": 2}), "last": (CHAT, {"messages": picture(png()), "max_tokens": 2})}
    found, tally = batch(
        {"first": good["first"]} | {name: line for name, (line, *_) in FAILING.items()} | {"broken": "{"} | {"last": good["last"]}
    )
    assert all(body(found[name])["choices"] for name in good)
    assert found[None]["error"]["code"] == "invalid_json_line"
    for name, (_, code, says) in FAILING.items():
        status, found_code, message = failure(found[name])
        assert (status, found_code) == (400, code), name
        assert says in message, name
        assert "\n" not in message
    assert (tally.done, tally.failed, tally.skipped) == (2, len(FAILING) + 1, 0)
    _, again = batch(good)
    assert (again.done, again.failed, again.skipped) == (0, 0, 2)


def test_a_surprise_in_preparing_is_its_lines_too(batch, monkeypatch):
    """What a library stumbles over at night must not cost the other lines; it may go better another time, so it is the server's."""

    def stumble(messages, *args, **options):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(prepare, "render", stumble)
    found, _ = batch({"a": (CHAT, {"messages": HELLO}), "b": (COMPLETIONS, {"prompt": "What", "max_tokens": 1})})
    assert failure(found["a"]) == (500, None, "ZeroDivisionError: by zero")
    assert body(found["b"])


def test_one_answer_that_fails_ends_those_beside_it(batch, engine, monkeypatch):
    """The line has one result, its error, and no slot is left to its other answers."""
    read, seen = Answer.read, []

    def fail(answer: Answer) -> bool:
        if answer.handle.request.max_new_tokens == 90 and len(seen) < 2:
            seen.append(answer)
            if len(seen) == 2:
                raise UserError("the logits are not finite")
        return read(answer)

    monkeypatch.setattr(Answer, "read", fail)
    found, tally = batch(
        {
            "a": (COMPLETIONS, {"prompt": "What", "max_tokens": 90, "ignore_eos": True, "n": 5}),
            "b": (COMPLETIONS, {"prompt": "What", "max_tokens": 1}),
        }
    )
    assert failure(found["a"]) == (400, None, "the logits are not finite")
    assert body(found["b"])
    assert (tally.done, tally.failed) == (1, 1)


def test_stopped_at_any_turn_it_goes_on(batch, engine):
    """What is written stays, the engine is free for others, and the answers are those of a run without an end."""
    asked: dict = {f"line {n}": (COMPLETIONS, {"prompt": "What is", "max_tokens": n}) for n in range(1, 8)}

    def stop(tally):
        if tally.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch(asked, told=stop)
    assert_empty(engine)
    found, tally = batch(asked)
    assert (tally.done, tally.skipped) == (4, 3)
    for n in range(1, 8):
        assert body(found[f"line {n}"])["usage"]["completion_tokens"] <= n
    (whole,) = batch({"line 7b": asked["line 7"]})[0].keys() - found.keys()
    assert whole == "line 7b"


def test_a_full_disk_ends_it(batch, engine, monkeypatch):
    """There is no sense in answers that cannot be kept; the next run makes them."""
    asked: dict = {f"line {n}": (COMPLETIONS, {"prompt": "What is", "max_tokens": 1}) for n in range(9)}

    def full(*args):
        raise UserError("out.jsonl cannot be written (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr(Results, "succeed", full)
        with pytest.raises(UserError, match="No space left"):
            batch(asked)
    assert_empty(engine)
    assert batch(asked)[1].done == 9


def test_log_probabilities(batch, model):
    """Of the text's tokens alone; they are the same in both forms, and add up to the answer."""
    common = {"max_tokens": 6, "temperature": 0}
    prompt = mj.Chat(model).prompt(HELLO).token_ids
    found, _ = batch(
        {
            "chat": (CHAT, common | {"messages": HELLO, "logprobs": True, "top_logprobs": 2}),
            "chosen": (CHAT, common | {"messages": HELLO, "logprobs": True}),
            "text": (COMPLETIONS, common | {"prompt": prompt, "logprobs": 2}),
            "zero": (COMPLETIONS, common | {"prompt": prompt, "logprobs": 0}),
            "none": (CHAT, common | {"messages": HELLO}),
        }
    )
    choice = {name: body(result)["choices"][0] for name, result in found.items()}
    content, text = choice["chat"]["logprobs"]["content"], choice["text"]["logprobs"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == choice["chat"]["message"]["content"] == choice["text"]["text"]
    assert [token["token"] for token in content] == text["tokens"]
    assert [token["logprob"] for token in content] == text["token_logprobs"]
    for token, top, place in zip(content, text["top_logprobs"], text["text_offset"], strict=True):
        assert {other["token"]: other["logprob"] for other in token["top_logprobs"]} == top
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert len(top) == 2
        assert top[token["token"]] == token["logprob"]
        assert choice["text"]["text"][place:].startswith(token["token"])
    assert [token["top_logprobs"] for token in choice["chosen"]["logprobs"]["content"]] == [[]] * len(content)
    assert [list(top) for top in choice["zero"]["logprobs"]["top_logprobs"]] == [[token["token"]] for token in content]
    assert choice["none"]["logprobs"] is None


def scripted(tokens: list[int], finish: Finish, **sampling) -> Handle:
    """As the engine leaves one."""
    request = Request(ids=[1], max_new_tokens=99, sampling=Sampling(**sampling))
    handle = Handle(request, more=lambda *_: None, cancel=lambda handle: handle.end(Finish.CANCELLED))
    handle.tokens, handle.logprobs = tokens, [(-math.inf, {token: -0.5}) for token in tokens]
    handle.finish = finish
    return handle


def test_a_stop_text_ends_it(model):
    """Tokens behind it, which drafts may have brought, do not count; before `min_tokens` none ends it."""
    tokenizer = mj.Chat(model).tokenizer
    tokens = tokenizer.encode("one, two, three")
    answer = Answer(scripted(tokens, Finish.LENGTH, logprobs=1), tokenizer, (", t",))
    assert answer.read().finish == "stop"
    assert answer.text == "one"
    assert len(answer.tokens) < answer.new_tokens < len(tokens)
    found = logprobs.of_completion(answer.tokens, tokenizer)
    assert "".join(found["tokens"]).startswith("one")
    assert max(found["text_offset"]) < len("one")
    assert set(found["token_logprobs"]) == {-9999.0}  # JSON has no infinity
    least = len(tokenizer.encode("one, two"))
    answer = Answer(scripted(tokens, Finish.LENGTH, min_tokens=least), tokenizer, (", t",))
    assert answer.read().finish
    assert answer.text == "one, two"
    answer = Answer(scripted(tokens, Finish.LENGTH), tokenizer, ("four",))
    assert answer.read().finish == "length"
    assert answer.text == "one, two, three"


def test_a_model_without_a_tokenizer(model, tmp_path):
    """It cannot read a text."""
    (tmp_path / "in.jsonl").write_text("{}")
    requests, nameless = Requests(tmp_path / "in.jsonl"), mj.load()
    nameless.directory = None
    with pytest.raises(UserError, match="not loaded from a directory"), Results(tmp_path / "out.jsonl", requests) as results:
        serve(Engine(nameless, slots=1, max_length=ROOM), requests, results, model="mini")
    assert not (tmp_path / "out.jsonl").exists()
