"""What trainers ask beside the text: token ids with the one that ended it, and the experts that computed them."""

import base64
import io

import numpy as np
import pytest

import maverick_jax as mj
from maverick_jax.serving.http.app import Settings
from maverick_jax.serving.http.server import Server, bound
from maverick_jax.serving.http.service import Service
from oracle.http_client import Client, choices_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "What is the sum?"}]


@pytest.fixture(scope="module")
def told():
    """A client of a server that tells experts, and the model, in float32: near a tie bfloat16 goes either way."""
    model = mj.load(dtype="float32")
    engine = mj.Engine(model, slots=2, max_length=256, routed_experts=True)
    with engine, Server(Service(engine, ["mini"]), Settings(), bound("127.0.0.1", 0)) as server:
        yield Client(server.url), model


def experts(model, ids: list[int]) -> np.ndarray:
    """[T, L, 1] of the whole text at once; layers without experts have 0."""
    config = model.config.text
    _, _, stats = model.hidden(model.embed(np.array([ids + [0] * (64 - len(ids))])))
    expert_TL1 = np.zeros((len(ids), config.num_hidden_layers, 1), int)
    for layer, s in zip(config.moe_layers, stats, strict=True):
        expert_TL1[:, layer, 0] = s.expert_T[: len(ids)]
    return expert_TL1


def check(model, choice: dict, prompt_ids: list[int], start: int = 0) -> None:
    found = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"], validate=True)), allow_pickle=False)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, experts(model, [*prompt_ids, *choice["token_ids"]][:-1])[start:])
    assert len(np.unique(found)) > 1


def test_experts_of_chats_and_completions(told):
    """Of every answer, whole and streamed, by the model's own routing."""
    client, model = told
    settings = {"max_tokens": 12, "seed": 1, "n": 2, "return_token_ids": True}
    for path, asked in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "What is"})):
        body = client.post(path, asked | settings).body
        for choice in body["choices"]:
            check(model, choice, body.get("prompt_token_ids") or choice["prompt_token_ids"])
        streamed = choices_of(list(client.events(path, asked | settings)))
        assert [choice["routed_experts"] for choice in streamed] == [choice["routed_experts"] for choice in body["choices"]]


def test_from_where_they_are_known(told):
    """A turn that goes on with an earlier one asks for what is new, and the rest comes from the cache."""
    client, model = told
    first = client.post(COMPLETIONS, {"prompt": "What is", "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}).body["choices"][
        0
    ]
    ids = first["prompt_token_ids"] + first["token_ids"]
    asked = {"prompt": [*ids, 5, 6, 7], "max_tokens": 4, "return_token_ids": True, "routed_experts_prompt_start": len(ids) - 1}
    body = client.post(COMPLETIONS, asked).body
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    check(model, body["choices"][0], asked["prompt"], len(ids) - 1)


def test_no_further_than_the_answer(told):
    """Where a text ends it the engine has gone on."""
    client, model = told
    cold = {"prompt": "What is", "max_tokens": 40, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    text = client.post(COMPLETIONS, cold).body["choices"][0]["text"]
    (choice,) = client.post(COMPLETIONS, cold | {"stop": text[5:8]}).body["choices"]
    assert choice["finish_reason"] == "stop"
    check(model, choice, choice["prompt_token_ids"])


def test_the_token_that_ends_an_answer(mini):
    """Is among its ids and its log-probabilities, and says nothing."""
    cold = {"messages": HELLO, "temperature": 0, "max_tokens": 40, "logprobs": True}
    plain = mini.post(CHAT, cold).body["choices"][0]
    (choice,) = mini.post(CHAT, cold | {"return_token_ids": True}).body["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"] == plain["message"]
    scores = choice["logprobs"]["content"]
    assert [score["token"] for score in scores] == [*(score["token"] for score in plain["logprobs"]["content"]), "<|eot|>"]
    assert -5 < scores[-1]["logprob"] < 0
    assert len(choice["token_ids"]) == len(scores)
    assert mini.post("/detokenize", {"tokens": choice["token_ids"][-1:]}).body["prompt"] == "<|eot|>"
    (streamed,) = choices_of(list(mini.events(CHAT, cold | {"return_token_ids": True})))
    assert streamed["token_ids"] == choice["token_ids"]
    assert streamed["logprobs"] == scores


def test_a_server_that_tells_none(mini):
    """Says so to who asks from where."""
    error = mini.post(CHAT, {"messages": HELLO, "routed_experts_prompt_start": 0}).error
    assert "--routed-experts" in error["message"]
    assert error["param"] == "routed_experts_prompt_start"
