"""What those who run a server rely on: keys, limits, the log, and an end in order."""

import gc
import json
import threading
import time

import pytest

from maverick_jax.errors import UserError
from maverick_jax.inference.request import Finish
from maverick_jax.serving.http import exchange
from maverick_jax.serving.http import keys as keys_module
from maverick_jax.serving.http import server as server_module
from maverick_jax.serving.http.app import Settings
from maverick_jax.serving.http.keys import VARIABLE, Keys
from maverick_jax.serving.http.server import Server, bound
from maverick_jax.serving.http.service import Service
from maverick_jax.serving.reply import Reply
from oracle.http_client import Client, until
from oracle.scripted_engine import ScriptedEngine

COMPLETIONS = "/v1/completions"
ASK = {"prompt": "x", "max_tokens": 100}


def test_keys_of_a_file(serve, tmp_path, monkeypatch):
    """A right one in either header, and no other; the file is read again when it has changed, and a broken one changes nothing."""
    monkeypatch.setattr(keys_module, "LOOK_AGAIN_S", 0.0)
    file = tmp_path / "keys"
    file.write_text("# ours\nalice key-a\nkey-b\n")
    lines = []
    client = serve("yes", keys=Keys(file), written=lambda line: lines.append(json.loads(line)))
    assert client.post(COMPLETIONS, ASK).error["code"] == "invalid_api_key"
    for header in ({"authorization": "Bearer key-a"}, {"authorization": "bearer key-b"}, {"x_api_key": "key-a"}):
        assert client.post(COMPLETIONS, ASK, **header).status == 200
    for header in ({"authorization": "Bearer key"}, {"authorization": "key-a"}, {"authorization": "Basic key-a"}, {"x_api_key": "alice"}):
        answer = client.post(COMPLETIONS, ASK, **header)
        assert (answer.status, answer.error["type"], answer.headers["www-authenticate"]) == (401, "authentication_error", "Bearer")
        assert "key-a" not in answer.error["message"]
    assert client.get("/v1/models").status == client.post("/tokenize", {"prompt": "x"}).status == 401
    assert client.get("/health").status == client.get("/version").status == 200
    file.write_text("carol key-c\n")
    assert client.post(COMPLETIONS, ASK, authorization="Bearer key-a").status == 401
    assert client.post(COMPLETIONS, ASK, authorization="Bearer key-c").status == 200
    file.write_text("")
    assert client.post(COMPLETIONS, ASK, authorization="Bearer key-c").status == 200
    until(lambda: len(lines) == 15)
    assert [line["key"] for line in lines if line["status"] == 200 and line["path"] == COMPLETIONS][::3] == ["alice", "carol"]
    assert not any("key-" in json.dumps(line) for line in lines)


def test_keys_of_the_environment(serve, monkeypatch):
    """Several, between commas."""
    monkeypatch.setenv(VARIABLE, "one, two")
    client = serve("yes", keys=Keys())
    assert client.post(COMPLETIONS, ASK, authorization="Bearer two").status == 200
    assert client.post(COMPLETIONS, ASK).status == 401


@pytest.mark.parametrize("text", [None, "", "# nobody\n", "a b c\n"], ids=["no file", "empty", "a comment", "three words"])
def test_files_that_have_no_keys(tmp_path, text):
    """A server that meant to have keys does not start without."""
    if text is not None:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(UserError, match=r"cannot be read|has no API keys"):
        Keys(tmp_path / "keys")


def test_how_much_a_key_may_have_running(serve, monkeypatch):
    """One more is told to come again; others are not concerned, and afterwards it may."""
    monkeypatch.setenv(VARIABLE, "one,two")
    engine = ScriptedEngine(lambda prompt: "x" * 100, pause=0.02)
    client = serve(engine, keys=Keys(at_once=2))
    threads = [threading.Thread(target=client.post, args=(COMPLETIONS, ASK), kwargs={"authorization": "Bearer one"}) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: len(engine.running) == 2)
    refused = client.post(COMPLETIONS, ASK, authorization="Bearer one")
    assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
    assert client.post(COMPLETIONS, {**ASK, "max_tokens": 1}, authorization="Bearer two").status == 200
    for thread in threads:
        thread.join()
    assert client.post(COMPLETIONS, {**ASK, "max_tokens": 1}, authorization="Bearer one").status == 200


def test_a_full_queue(serve):
    """Of several answers none is left in the engine."""
    engine = ScriptedEngine(lambda prompt: "x" * 100, pause=0.01, most=3)
    refused = serve(engine).post(COMPLETIONS, {**ASK, "n": 5})
    assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
    until(lambda: not engine.running)
    assert [handle.finish for handle in engine.handles] == [Finish.CANCELLED] * 3


def test_the_log_has_no_prompts(serve):
    """A line of JSON for each request: who, what, how long, and what it cost."""
    lines = []
    client = serve("a secret answer", written=lambda line: lines.append(json.loads(line)))
    client.post(COMPLETIONS, {"prompt": "a secret prompt"}, x_request_id="my-name")
    client.get("/v1/nothing")
    until(lambda: len(lines) == 2)
    assert [(line["path"], line["status"], line["key"]) for line in lines] == [(COMPLETIONS, 200, "-"), ("/v1/nothing", 404, "-")]
    assert (lines[0]["request"], lines[0]["finish"]) == ("my-name", ["stop"])
    assert lines[0]["prompt_tokens"] > 10 < lines[0]["new_tokens"]
    assert "secret" not in json.dumps(lines)
    assert client.get("/health", x_request_id="mine").headers["x-request-id"] == "mine"


def test_who_leaves_in_the_midst_of_a_body(serve, caplog):
    """It is no stumble of the server's: a line with status 499, and nothing else."""
    lines = []
    client = serve("yes", written=lambda line: lines.append(json.loads(line)))
    for path in (COMPLETIONS, "/tokenize"):
        client.connect(f"POST {path} HTTP/1.1\r\nhost: here\r\ncontent-length: 100\r\n\r\n{{".encode()).close()
    until(lambda: len(lines) == 2)
    assert [line["status"] for line in lines] == [499, 499]
    assert not caplog.records


def test_a_body_that_does_not_come(serve, monkeypatch):
    """It is waited for so long, and no longer."""
    monkeypatch.setattr(exchange, "BODY_S", 0.2)
    with serve("yes").connect(f"POST {COMPLETIONS} HTTP/1.1\r\nhost: here\r\ncontent-length: 100\r\n\r\n".encode()) as slow:
        assert b"408" in slow.recv(4096)


def test_pages_of_others_may_ask_where_they_are_allowed(serve):
    """Not by default."""
    asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in serve("yes").ask("OPTIONS", COMPLETIONS, None, asked).headers
    client = serve("yes", origins=["https://example.org"])
    assert client.ask("OPTIONS", COMPLETIONS, None, asked).headers["access-control-allow-origin"] == "https://example.org"
    assert "access-control-allow-origin" not in client.post(COMPLETIONS, ASK, origin="https://example.com").headers


def ending(said: str, pause: float, grace_s: float) -> tuple[list, float, list]:
    """What a stream gets of a server that is closed in its midst, how long closing took, and what still runs."""
    engine, events = ScriptedEngine(lambda prompt: said, pause=pause), []
    server = Server(Service(engine, ["mini"]), Settings(grace_s=grace_s), bound("127.0.0.1", 0))
    with server:
        client = Client(server.url)
        thread = threading.Thread(target=lambda: events.extend(client.events(COMPLETIONS, {**ASK, "max_tokens": 1000})))
        thread.start()
        until(lambda: engine.running and engine.running[0].tokens)
        began = time.monotonic()
    took = time.monotonic() - began
    thread.join()
    until(lambda: not engine.running)
    with pytest.raises(OSError, match="refused"):
        client.get("/health")
    return events, took, engine.running


def test_it_lets_answers_end(monkeypatch):
    """A stream that can end within the grace does."""
    events, _, _ = ending("x" * 60, pause=0.01, grace_s=30)
    assert events[-1] == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "x" * 60


def test_it_tells_those_who_cannot_end():
    """The stream ends with an error, not in the midst of a word, and the engine is free."""
    events, took, _ = ending("x" * 100_000, pause=0.01, grace_s=0.3)
    assert events[-1] == "[DONE]"
    assert "shutting down" in events[-2]["error"]["message"]
    assert took < 5


def test_a_client_that_stops_reading(serve, monkeypatch):
    """Its answer is computed all the same, and then the connection goes, with what waited for it."""
    monkeypatch.setattr(server_module, "STALLED_S", 1)
    engine = ScriptedEngine(lambda prompt: "x" * 60_000)
    client = serve(engine)
    body = json.dumps({"prompt": "x", "max_tokens": 60_000, "stream": True, "return_token_ids": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: here\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with client.connect(head + body, receive_buffer=4096):
        until(lambda: engine.seen)
        until(lambda: not engine.running, 60)
        until(lambda: not replies(), 30)


def replies() -> list[Reply]:
    """Those that somebody in this process still holds."""
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is Reply]  # isinstance would ask torch's objects, which warn


def test_an_address_that_cannot_be_had():
    """One line that names it."""
    with Server(Service(ScriptedEngine(lambda prompt: ""), ["mini"]), Settings(), bound("127.0.0.1", 0)) as server:
        port = int(server.url.rpartition(":")[2])
        for host, wrong in (("127.0.0.1", port), ("nowhere.invalid", 0)):
            with pytest.raises(UserError, match=f"{host}:{wrong} cannot be listened at"):
                bound(host, wrong)
