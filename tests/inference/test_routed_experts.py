"""Which experts tokens went to: the model's own choice, however a prompt is cut, whoever is served beside it, and at what is drawn."""

import io

import numpy as np
import pytest

from maverick_jax.errors import UserError
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.request import Request
from maverick_jax.inference.scheduling.trace import replay
from oracle.plain import plain_model

LAYERS = {"attention_chunk_size": 16, "moe_layers": (1, 2), "num_local_experts": 8}


@pytest.fixture(scope="module")
def model():
    """The last layer is a mixture, which a prefill cuts short where nobody asks; chunks of 16 tokens, so that prompts have pieces."""
    return plain_model(**LAYERS)


def engine(model, **more) -> Engine:
    """One geometry for all of them: programs are compiled once."""
    return Engine(model, slots=3, max_length=64, pages=5, routed_experts=True, **more)


def expected(model, ids: list[int]) -> np.ndarray:
    """[T, M] of the whole text at once, without a cache."""
    _, _, stats = model.hidden(model.embed(np.array([ids + [0] * (64 - len(ids))])))
    return np.stack([np.asarray(s.expert_T) for s in stats], axis=1)[: len(ids)]


def check(model, handle, start: int = 0) -> None:
    """What was drawn last is computed by nobody."""
    read = [*handle.request.ids.tolist(), *handle.tokens, *([] if handle.stop_token is None else [handle.stop_token])][:-1]
    experts_TM = handle.routed_experts
    assert experts_TM.dtype == np.uint8
    assert len(set(experts_TM.ravel().tolist())) > 1
    np.testing.assert_array_equal(experts_TM, expected(model, read)[start:])


@pytest.mark.parametrize("draft", [0, 3])
def test_they_are_the_models_own(model, draft):
    """Of prompts of several pieces and of one token, beside one that does not ask; drafts that are not taken leave nothing."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, 20, n).tolist() for n in (50, 7, 1)] + [[5, 6, 7] * 6, [1, 2]]
    serving = engine(model, draft=draft)
    requests = [Request(ids=ids, max_new_tokens=12, stop_ids=(), routed_experts_prompt_start=0) for ids in prompts[:-1]]
    *handles, other = serving.run([*requests, Request(ids=prompts[-1], max_new_tokens=12, stop_ids=())])
    for handle in handles:
        check(model, handle)
    assert other.routed_experts.size == 0
    if draft:
        assert serving.drafted.proposed > serving.drafted.accepted


def test_from_a_token_on(model):
    """What comes before may be taken from the cache, and nothing behind it."""
    ids = np.random.default_rng(1).integers(1, 20, 40).tolist()
    serving = engine(model)
    serving.run([Request(ids=ids, max_new_tokens=4, stop_ids=())])
    for start, cached in ((0, 0), (17, 16), (33, 33), (39, 39)):
        (handle,) = serving.run([Request(ids=ids, max_new_tokens=4, stop_ids=(), routed_experts_prompt_start=start)])
        assert handle.cached_tokens == cached
        check(model, handle, start)


def test_who_loses_its_place_has_them_all(model):
    """They come again with what is computed again; and a trace of it says how much was reused."""
    ids, trace = np.random.default_rng(3).integers(1, 20, (3, 30)).tolist(), io.StringIO()
    serving = engine(model, trace=trace)
    handles = serving.run([Request(ids=row, max_new_tokens=30, stop_ids=(), routed_experts_prompt_start=0) for row in ids])
    assert serving.occupancy.preempted
    for handle in handles:
        check(model, handle)
    assert sum(len(plan.preempted) for _, plan in replay(trace.getvalue().splitlines())) == serving.occupancy.preempted


def test_the_token_that_ends_an_answer_is_drawn_too(model):
    """So what it came behind has been computed."""
    serving = engine(model)
    (first,) = serving.run([Request(ids=[3, 1, 4], max_new_tokens=8, stop_ids=())])
    stop = next(token for token in first.tokens[1:] if token != first.tokens[0])
    (handle,) = serving.run([Request(ids=[3, 1, 4], max_new_tokens=8, stop_ids=[stop], routed_experts_prompt_start=0)])
    assert handle.stop_token == stop
    assert len(handle.routed_experts) == 3 + len(handle.tokens)
    check(model, handle)


@pytest.mark.parametrize("wrong", [-1, 3, 1.5, True])
def test_a_token_that_there_is_not(model, wrong):
    """The line says which there are."""
    serving = engine(model)
    with pytest.raises(UserError, match=r"routed_experts_prompt_start is .* a token of the prompt, between 0 and 2"):
        serving.submit(Request(ids=[1, 2, 3], max_new_tokens=1, routed_experts_prompt_start=wrong))


def test_an_engine_that_cannot_tell(model):
    """Its programs do not say it."""
    with pytest.raises(UserError, match="make it with routed_experts=True"):
        Engine(model, slots=1, max_length=64).submit(Request(ids=[1], max_new_tokens=1, routed_experts_prompt_start=0))


def test_a_model_without_experts():
    """There is nothing to tell: it is said when the engine is made, not by a request."""
    with pytest.raises(UserError, match="the model has no layers with experts"):
        Engine(plain_model(num_hidden_layers=1, moe_layers=(), nope_layers=()), slots=1, max_length=64, routed_experts=True)
