"""How likely a prompt's tokens are: the model's own log-probabilities, wherever the prompt is cut and whoever is served beside it."""

import jax
import numpy as np
import pytest

from maverick_jax.errors import UserError
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.request import Request
from maverick_jax.inference.sampling import Sampling
from oracle.plain import plain_model


@pytest.fixture(scope="module")
def model():
    """With chunks of 16 tokens, so that a prompt has several pieces."""
    return plain_model(num_hidden_layers=4, attention_chunk_size=16)


def engine(model, **more) -> Engine:
    """One geometry for all of them: programs are compiled once."""
    return Engine(model, slots=3, max_length=64, pages=5, **more)


def expected(model, ids: list[int]) -> np.ndarray:
    """[T - 1, V] of the whole prompt at once, without a cache: row t says what comes at t + 1."""
    logits_BTV = model(np.array([ids + [0] * (64 - len(ids))]))
    return np.asarray(jax.nn.log_softmax(logits_BTV, axis=-1))[0, : len(ids) - 1]


@pytest.mark.parametrize("draft", [0, 3])
def test_they_are_the_models_own(model, draft):
    """Prompts of several chunks and of one token, beside others that ask for none; the same prompt twice is computed twice."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, 20, n).tolist() for n in (50, 7, 1, 33)]
    prompts.append(prompts[0])
    serving = engine(model, draft=draft)
    wanted = [5, 0, 2, None, 5]
    requests = [Request(ids=ids, max_new_tokens=4, stop_ids=(), prompt_logprobs=n) for ids, n in zip(prompts, wanted, strict=True)]
    handles = serving.run(requests)
    for handle, ids, most in zip(handles, prompts, wanted, strict=True):
        if most is None:
            assert handle.prompt_logprobs == []
            continue
        assert handle.cached_tokens == 0
        assert len(handle.prompt_logprobs) == len(ids)
        assert handle.prompt_logprobs[0] is None
        for (own, likely), row_V, token in zip(handle.prompt_logprobs[1:], expected(model, ids), ids[1:], strict=True):
            assert own == pytest.approx(row_V[token], abs=1e-4)
            assert len(likely) == most
            best = np.sort(row_V)[::-1][:most]
            np.testing.assert_allclose(list(likely.values()), best, atol=1e-4)
    plain = engine(model).run([Request(ids=ids, max_new_tokens=4, stop_ids=()) for ids in prompts])
    assert [handle.tokens for handle in handles] == [handle.tokens for handle in plain]


def test_what_is_in_the_cache_is_computed_again(model):
    """Of a prompt that has just been served; nobody knows how likely its tokens were."""
    ids, serving = np.random.default_rng(2).integers(1, 20, 30).tolist(), engine(model)
    for wanted, cached in ((None, 0), (None, 16), (0, 0)):
        (handle,) = serving.run([Request(ids=ids, max_new_tokens=4, stop_ids=(), prompt_logprobs=wanted)])
        assert handle.cached_tokens == cached
    assert len(handle.prompt_logprobs) == 30


def test_who_loses_its_place_keeps_them(model):
    """A request that is preempted and computed again has each once."""
    ids = np.random.default_rng(1).integers(1, 20, (3, 30)).tolist()
    serving = engine(model)
    handles = serving.run([Request(ids=row, max_new_tokens=30, stop_ids=(), prompt_logprobs=0) for row in ids])
    assert serving.occupancy.preempted
    for handle, row in zip(handles, ids, strict=True):
        own = [score[0] for score in handle.prompt_logprobs[1:]]
        np.testing.assert_allclose(own, [row_V[token] for row_V, token in zip(expected(model, row), row[1:], strict=True)], atol=1e-4)


def test_with_log_probabilities_of_the_answer(model):
    """Together they are those of the whole text."""
    ids = [3, 1, 4, 1, 5]
    (handle,) = engine(model).run([Request(ids=ids, max_new_tokens=5, stop_ids=(), prompt_logprobs=0, sampling=Sampling(logprobs=0))])
    own = [score[0] for score in handle.prompt_logprobs[1:]] + [own for own, _ in handle.logprobs]
    whole = [*ids, *handle.tokens]
    np.testing.assert_allclose(own, [row_V[token] for row_V, token in zip(expected(model, whole), whole[1:], strict=True)], atol=1e-4)


@pytest.mark.parametrize("wrong", [-1, 21, 1.5, True])
def test_how_many_may_be_asked_for(model, wrong):
    """As many as for new tokens."""
    with pytest.raises(UserError, match="prompt_logprobs is"):
        engine(model).submit(Request(ids=[1], max_new_tokens=1, prompt_logprobs=wrong))
