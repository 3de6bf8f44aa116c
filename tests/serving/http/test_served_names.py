"""Who answers is said by `model`, in all dialects: the model, or one of its adapters."""

import json

import pytest

import maverick_jax as mj
from maverick_jax.errors import UserError
from maverick_jax.model.low_rank import add_adapters
from maverick_jax.serving.batch import Requests, Results
from maverick_jax.serving.batch import serve as serve_batch
from maverick_jax.serving.http.app import Settings
from maverick_jax.serving.http.server import Server, bound
from maverick_jax.serving.http.service import Service
from oracle.adapted import teach
from oracle.http_client import Client, until
from oracle.scripted_engine import ScriptedEngine

ASKED = [{"role": "user", "content": "What is the sum?"}]
COLD = {"temperature": 0, "max_tokens": 6}
NAMES = ("mini", "support", "poems")
BODIES = {
    "/v1/chat/completions": {"messages": ASKED, **COLD},
    "/v1/responses": {"input": "What is the sum?", "temperature": 0, "max_output_tokens": 6},
    "/v1/completions": {"prompt": "What is", **COLD},
    "/v1/messages": {"messages": ASKED, **COLD},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("adapters"), {}
    for seed, name in enumerate(NAMES[1:]):
        model = mj.load()
        add_adapters(model, {"attention": 2, "unembedding": 2}, scale=20.0, seed=seed)
        teach(model, seed)
        paths[name] = mj.save_adapter(model, folder / name)
    return paths


@pytest.fixture(scope="module")
def engine(adapters):
    return mj.Engine(mj.load(), slots=4, max_length=128, adapters=adapters)


@pytest.fixture(scope="module")
def expected(adapters):
    """What each says to the chat's question offline."""
    models = {"mini": mj.load(), **{name: mj.load(adapter=path) for name, path in adapters.items()}}
    said = {name: mj.Chat(model, max_new_tokens=6)("What is the sum?") for name, model in models.items()}
    assert len({*said.values()}) == len(NAMES)
    return said


def text_of(path: str, body: dict) -> str:
    match path:
        case "/v1/chat/completions":
            return body["choices"][0]["message"]["content"]
        case "/v1/completions":
            return body["choices"][0]["text"]
        case "/v1/messages":
            return body["content"][0]["text"]
    return body["output"][0]["content"][0]["text"]


def test_each_name_answers_in_every_dialect(engine, expected):
    """As a model does that was loaded with the adapter; who is unknown is refused with the names there are."""
    lines = []
    with engine, Server(Service(engine, ["mini"]), Settings(written=lines.append), bound("127.0.0.1", 0)) as server:
        client, completed = Client(server.url), set()
        listed = client.get("/v1/models").body["data"]
        assert [(one["id"], one.get("parent")) for one in listed] == [("mini", None), ("support", "mini"), ("poems", "mini")]
        assert client.get("/v1/models/poems").body["parent"] == "mini"
        for path, body in BODIES.items():
            for name in NAMES:
                answer = client.post(path, {"model": name, **body})
                assert answer.body["model"] == name
                if path == "/v1/completions":
                    completed.add(text_of(path, answer.body))
                else:
                    assert text_of(path, answer.body) == expected[name], (path, name)
                until(lambda name=name: lines and json.loads(lines[-1])["model"] == name)  # the line is written behind the answer
            wrong = client.post(path, {"model": "poem", **body})
            assert (wrong.status, wrong.body["error"]["message"]) == (404, "model is 'poem': here is mini, support, poems.")
        assert len(completed) == len(NAMES)
        for name in NAMES:
            ended = f'vllm:request_success_total{{engine="0",finished_reason="length",model_name="{name}"}}'
            assert f"{ended} " in client.get("/metrics").body


def test_lines_of_a_batch(engine, expected, tmp_path):
    """Each line's own; a name that nobody has fails its line alone."""
    bodies = {name: BODIES["/v1/chat/completions"] | {"model": name} for name in (*NAMES, "poem")} | {
        "none": BODIES["/v1/chat/completions"]
    }
    asked = [{"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": body} for id, body in bodies.items()]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, asked)))
    requests = Requests(tmp_path / "in")
    with Results(tmp_path / "out", requests) as results:
        tally = serve_batch(engine, requests, results, model="mini")
    assert (tally.done, tally.failed) == (4, 1)
    found = {one["custom_id"]: one["response"] for one in map(json.loads, (tmp_path / "out").read_text().splitlines())}
    for id, name in {**{name: name for name in NAMES}, "none": "mini"}.items():
        assert (found[id]["body"]["model"], text_of("/v1/chat/completions", found[id]["body"])) == (name, expected[name])
    assert found["poem"]["status_code"] == 404
    assert found["poem"]["body"]["error"]["message"] == "model is 'poem': here is mini, support, poems."


def test_an_adapter_with_the_models_name():
    """Nobody could ask for it."""
    engine = ScriptedEngine(lambda prompt: "yes")
    engine.adapters = ("other", "mini")
    with pytest.raises(UserError, match="the adapter 'mini' has the model's name"):
        Service(engine, ["maverick", "mini"])
