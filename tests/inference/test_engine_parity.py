"""The engine says what transformers says: tiny Maverick and Scout, with pictures, however a prompt is cut and whoever is beside it."""

import io

import numpy as np
import pytest

from maverick_jax.inference import engine as engine_module
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.request import Request
from maverick_jax.inference.scheduling.trace import replay
from oracle.forward import text_ids
from oracle.pair import picture_prompt

NEW = 8
LONGEST = 96


@pytest.fixture(scope="module")
def prompts() -> list[tuple[list[int], np.ndarray | None]]:
    """Up to, at and over the chunks of 16; two that begin alike; pictures, the second time with other ones."""
    text = [text_ids(1, n, seed=n)[0].tolist() for n in (1, 16, 53)]
    (ids,), tiles = picture_prompt()
    return [*((ids, None) for ids in (*text, [*text[-1][:40], 9, 8])), (ids.tolist(), tiles), (ids.tolist(), tiles[::-1].copy())]


@pytest.fixture
def case(tiny, prompts, answers):
    """Our model, requests, and transformers' greedy answers to them."""
    if tiny not in answers:
        answers[tiny] = [greedy(tiny, *prompt) for prompt in prompts]
    return tiny.model, [Request(ids=ids, tiles=tiles, max_new_tokens=NEW, stop_ids=()) for ids, tiles in prompts], answers[tiny]


@pytest.fixture(scope="module")
def answers() -> dict:
    return {}


def greedy(tiny, ids: list[int], tiles: np.ndarray | None, new: int = NEW) -> list[int]:
    """Each token from the whole sequence before it, without a cache."""
    ids = list(ids)
    for _ in range(new):
        ids.append(int(tiny.expected_logits([ids], tiles)[0, -1].argmax()))
    return ids[-new:]


@pytest.mark.parametrize("options", [dict(), dict(pages=7, draft=2, reuse=False)], ids=["default", "few pages, drafts, no reuse"])
def test_company_and_arrival(case, options):
    """Requests that come at random into few slots, twice: the second time all have been seen. With few pages some wait for others'."""
    model, requests, expected = case
    engine = Engine(model, slots=3, max_length=LONGEST, **options)
    random = np.random.default_rng(0)
    for _ in range(2):
        handles = {}
        for place in random.permutation(len(requests)):
            handles[place] = engine.submit(requests[place])
            for _ in range(random.integers(4)):
                engine.step()
        while not all(handle.finish for handle in handles.values()):
            engine.step()
        assert [handles[place].tokens for place in range(len(requests))] == expected
        engine._serving.scheduler.check()
    assert engine.dropped == 0


@pytest.mark.parametrize("sizes", [(1,), (3, 5)], ids=str)
def test_pieces_of_any_size(case, monkeypatch, sizes):
    """Through the text and through the middle of a picture's tile."""
    model, requests, expected = case
    monkeypatch.setattr(engine_module, "pieces", lambda longest: sizes)
    engine = Engine(model, slots=2, max_length=LONGEST)
    assert [handle.tokens for handle in engine.run(requests)] == expected


def test_a_single_row_has_one_beside_it_on_a_gpu(case, monkeypatch):
    """That is none, and of which nothing is to be seen."""
    model, requests, expected = case
    monkeypatch.setattr(engine_module, "platform_of", lambda model: "gpu")
    engine = Engine(model, slots=1, max_length=LONGEST)
    assert engine.limits.decode_rows == (2,)
    assert [handle.tokens for handle in engine.run(requests)] == expected


def test_preempted_and_computed_again(tiny, prompts):
    """Answers that outgrow the pages, a picture among them: the younger rows give theirs away, and come back."""
    asked, new, trace = [prompts[4], *prompts[1:3]], 30, io.StringIO()
    engine = Engine(tiny.model, slots=3, max_length=LONGEST, pages=8, trace=trace)
    handles = engine.run([Request(ids=ids, tiles=tiles, max_new_tokens=new, stop_ids=()) for ids, tiles in asked])
    assert [handle.tokens for handle in handles] == [greedy(tiny, *prompt, new) for prompt in asked]
    assert sum(len(plan.preempted) for _, plan in replay(trace.getvalue().splitlines())) > 0
