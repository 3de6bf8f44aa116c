"""A judge's scores: what is counted, what is kept, and what an endpoint may do."""

import http.server
import json
import threading

import numpy as np
import pytest
from PIL import Image

from maverick_jax.assets import mini_directory
from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.training.data.files import reading_of
from maverick_jax.training.rollouts import judges
from maverick_jax.training.rollouts.filtering import KEPT, SCORES, Score, histogram, keep, score
from maverick_jax.training.rollouts.judges import Endpoint
from maverick_jax.training.rollouts.prompts import read_prompts
from maverick_jax.training.rollouts.rewards import exact

READING = reading_of(mini_directory(), Config.from_directory(mini_directory()))


class Counting:
    """Right about prompt n in n of its answers; remembers what it was asked."""

    def __init__(self):
        self.asked: list[int] = []

    def answers(self, prompts, count, max_new_tokens, seed):
        self.asked += [prompt.number for prompt in prompts]
        return [["yes"] * min(prompt.number - 1, count) + ["no"] * max(0, count - prompt.number + 1) for prompt in prompts]


@pytest.fixture
def file(tmp_path):
    """Five prompts; the second line is written otherwise than json would write it."""
    file = tmp_path / "data.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"{n}"}], "answer": "yes"} for n in range(5)]
    texts = [json.dumps(line) for line in lines]
    texts[1] = '{ "answer":"yes","messages":[{"content":"1","role":"user"}] }'
    file.write_text("\n".join(texts))
    return file


def scored(file, out, judge, reward=exact, told=print):
    out.mkdir(exist_ok=True)
    prompts, _ = read_prompts(file, READING, length=40)
    return score(prompts, judge, reward, out, count=4, max_new_tokens=3, told=told)


def test_scores_and_what_is_kept(file, tmp_path):
    """The lines within the borders, byte for byte and in their order."""
    out = tmp_path / "out"
    scores = scored(file, out, Counting())
    assert [found.rate for found in scores] == [0, 0.25, 0.5, 0.75, 1]
    assert keep(file, scores, out, lowest=0.25, highest=0.5) == 2
    assert (out / KEPT).read_bytes().splitlines() == file.read_bytes().splitlines()[1:3]
    assert keep(file, scores, out, lowest=1, highest=1) == 1
    assert (out / KEPT).read_bytes() == file.read_bytes().splitlines()[4] + b"\n"
    assert histogram(scores, width=4).splitlines() == [f"  {n} of 4 right  1 ████" for n in range(5)]


def test_it_goes_on(file, tmp_path):
    """After a kill in the middle of a line: what has a score is not judged again."""
    out = tmp_path / "out"
    whole = scored(file, out, Counting())
    text = (out / SCORES).read_text()
    (out / SCORES).write_text(text[: text.index('{"line": 4') + 5])
    judge = Counting()
    assert scored(file, out, judge) == whole
    assert judge.asked == [4, 5]
    assert (out / SCORES).read_text() == text


def test_a_reward_that_fails(file, tmp_path):
    """Has no score and is not kept; the third in a row ends it, and what was scored stays."""
    told: list[str] = []

    def no_two(text, line):
        assert line["messages"][0]["content"] != "2"
        return exact(text, line)

    scores = scored(file, tmp_path / "one", Counting(), no_two, told.append)
    assert [found.line for found in scores] == [1, 2, 4, 5]
    assert "line 3: the reward of 'yes' raised AssertionError" in told[0]

    def only_first(text, line):
        return exact(text, line) if line["messages"][0]["content"] == "0" else float("nan")

    with pytest.raises(UserError, match=r"line 4: the reward of 'yes' is nan: give a finite number\. \(3 prompts in a row\.\)"):
        scored(file, tmp_path / "two", Counting(), only_first)
    assert (tmp_path / "two" / SCORES).read_text().count("\n") == 1


def test_pass_at_k():
    """As all subsets of the answers say."""
    assert Score(1, 2, 4).pass_at(1) == 0.5
    np.testing.assert_allclose(Score(1, 2, 4).pass_at(2), 1 - 1 / 6)
    assert Score(1, 1, 4).pass_at(4) == 1
    assert Score(1, 0, 4).pass_at(4) == 0


class Answering(http.server.BaseHTTPRequestHandler):
    """What an endpoint says: first that it is busy, then the number of pictures and of characters."""

    asked: list[dict] = []  # noqa: RUF012
    busy = 0
    refuses = False

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        cls = type(self)
        if cls.refuses:
            return self.say(404, {"error": {"message": "no such model"}})
        if cls.busy:
            cls.busy -= 1
            return self.say(503, {})
        cls.asked.append({**body, "key": self.headers.get("Authorization")})
        self.say(200, {"choices": [{"message": {"content": "yes"}}]})

    def say(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(judges, "PAUSE", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    Answering.asked, Answering.busy, Answering.refuses = [], 0, False
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1/", "judge")
        server.shutdown()
        thread.join()


def test_an_endpoint(endpoint, tmp_path):
    """Gets the conversation without its answer, pictures in it; a busy one is asked again."""
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    Answering.busy = 2
    (found,) = scored(tmp_path / "data.jsonl", tmp_path / "out", endpoint)
    assert found.rate == 1
    assert len(Answering.asked) == 4
    asked = Answering.asked[0]
    assert [message["role"] for message in asked["messages"]] == ["user"]
    assert asked["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert (asked["model"], asked["max_tokens"], asked["temperature"], asked["key"]) == ("judge", 3, 1.0, "Bearer key")
    assert sorted(body["seed"] for body in Answering.asked) == [0, 1, 2, 3]


def test_an_endpoint_that_is_not_there(endpoint, file, tmp_path):
    Answering.refuses = True
    with pytest.raises(UserError, match=r"/v1/chat/completions refuses the request \(404 Not Found .*no such model"):
        scored(file, tmp_path / "out", endpoint)
    with pytest.raises(UserError, match=r"did not answer, 4 times \(URLError: .*the scores so far are kept"):
        scored(file, tmp_path / "out", Endpoint("http://127.0.0.1:9/v1", "judge"))
