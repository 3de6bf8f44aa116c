"""The engine: whoever comes and goes beside it, a request gets the tokens that it gets alone, and nothing is left behind."""

import dataclasses
import io
import json
import threading
import time
import weakref

import jax
import numpy as np
import pytest

from maverick_jax.errors import UserError
from maverick_jax.inference import engine as engine_module
from maverick_jax.inference.admission import admitted
from maverick_jax.inference.checks import NoRoom
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.followers import Leader, as_json, from_json
from maverick_jax.inference.generate import generate
from maverick_jax.inference.grammar import Grammar
from maverick_jax.inference.handle import Handle, Stopped
from maverick_jax.inference.request import Finish, Full, Request, Row
from maverick_jax.inference.runner import Content, Launched
from maverick_jax.inference.sampling import NOT_FINITE, Sampling
from maverick_jax.inference.scheduling.trace import replay
from maverick_jax.inference.serving import Serving
from maverick_jax.sharding import multihost
from oracle.compiling import no_compilation
from oracle.plain import PATCH, SIDE, VISION, plain_model

NEW = 12


@pytest.fixture(scope="module")
def model():
    """A chunk of 8, so that a few tokens cross borders; pictures of one token per tile."""
    return plain_model(vision=VISION, num_hidden_layers=2, attention_chunk_size=8, max_position_embeddings=64)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Prompts of all lengths, some of them alike, two with pictures that differ, greedy and drawn."""
    random = np.random.default_rng(0)
    shared = random.integers(4, 40, 21).tolist()
    tiles = random.uniform(-1, 1, (3, 3, SIDE, SIDE)).astype(np.float32)
    found = [Request(ids=random.integers(4, 40, n).tolist(), max_new_tokens=NEW, stop_ids=()) for n in (1, 8, 9, 30, 3, 17)]
    found += [Request(ids=shared[:n], max_new_tokens=NEW, stop_ids=()) for n in (21, 21, 15, 16)]
    found += [Request(ids=[5, PATCH, 6, PATCH, *shared[:9]], tiles=t, max_new_tokens=NEW, stop_ids=()) for t in (tiles[:2], tiles[1:])]
    found += [Request(ids=shared, max_new_tokens=NEW, stop_ids=(), sampling=Sampling(temperature=1.0, seed=seed)) for seed in (1, 2)]
    return found


@pytest.fixture(scope="module")
def alone(model, requests) -> list[list[int]]:
    """What each request says with nobody beside it and nothing before it."""
    return [Engine(model, slots=1, max_length=64, reuse=False).run([request])[0].tokens for request in requests]


def engine(model, **options) -> Engine:
    return Engine(model, **{"slots": 4, "max_length": 64, **options})


def is_empty(engine: Engine) -> bool:
    """Slots, pages and handles: everything came back."""
    engine._serving.scheduler.check()
    return engine._serving.scheduler.idle and not engine._serving.by_number


def test_alone_is_what_the_model_says(model, requests, alone):
    """Token by token the likeliest of the whole sequence's logits, computed without a cache."""
    for request, tokens in zip(requests[:6], alone, strict=False):
        hidden, _, _ = model.hidden(model.embed(np.array([[*request.ids, *tokens]])))
        logits = np.asarray(model.logits(hidden))[0, len(request.ids) - 1 : -1]
        assert logits.argmax(axis=-1).tolist() == tokens


@pytest.mark.parametrize("options", [{}, dict(pages=10), dict(reuse=False)], ids=["default", "few pages", "no reuse"])
def test_any_company_and_any_order(model, requests, alone, options):
    """In order and backwards, with few slots, few pages (rows are preempted and computed again), with and without reuse."""
    for order in (1, -1):
        serving = engine(model, **options)
        handles = serving.run(requests[::order])
        assert [handle.tokens for handle in handles] == alone[::order]
        assert {handle.finish for handle in handles} == {Finish.LENGTH}
        assert is_empty(serving)


def test_a_prompt_seen_before_is_not_read_again(model, requests, alone):
    """The second time all but the last token is there, pictures are not encoded again, and the tokens are the same."""
    serving = engine(model)
    serving.run(requests)
    encoded = serving._serving.runner.features.encoded
    for request, tokens in list(zip(requests, alone, strict=True))[-4:]:
        (handle,) = serving.run([request])
        assert handle.tokens == tokens
        assert handle.cached_tokens >= 8
    assert serving._serving.runner.features.encoded == encoded == 3


def test_other_pictures_are_no_prefix(model, requests, alone):
    """Two prompts with the same tokens and other pictures share what comes before the picture, and no more."""
    serving = engine(model, slots=1)
    (first,), (second,) = serving.run([requests[10]]), serving.run([requests[11]])
    assert [first.tokens, second.tokens] == alone[10:12]
    assert first.tokens != second.tokens
    assert second.cached_tokens <= 1


def test_keys_in_eight_bits(model, requests, alone):
    """Half of the memory, and most of the tokens: it is an approximation, which `reuse` must not make a different one."""
    small, large = engine(model, eight_bits=True), engine(model)
    assert small.room.bytes < large.room.bytes / 2
    found = [handle.tokens for handle in small.run(requests)]
    assert found == [handle.tokens for handle in engine(model, eight_bits=True, reuse=False).run(requests)]
    agreeing = sum(a == b for ours, theirs in zip(found, alone, strict=True) for a, b in zip(ours, theirs, strict=True))
    assert agreeing > 0.5 * NEW * len(requests)


def test_many_answers_to_one_prompt_read_it_once(model):
    """Those that come together wait for the first one's prefill."""
    serving = engine(model)
    ids = np.random.default_rng(1).integers(4, 40, 40).tolist()
    asked = [Request(ids=ids, max_new_tokens=4, stop_ids=(), sampling=Sampling(temperature=1.0, seed=seed)) for seed in range(4)]
    handles = serving.run(asked)
    assert [handle.cached_tokens for handle in handles] == [0, 39, 39, 39]
    expected = generate(model, [ids] * 4, max_new_tokens=4, stop_ids=(), temperature=1.0, seed=0)
    assert [handle.tokens for handle in handles] == expected


def all_run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)


def test_from_many_threads(model, requests, alone):
    """Submitted at the same time from threads of their own, iterated there, while others are cancelled."""
    found: dict[int, list[int]] = {}
    with engine(model) as serving:

        def ask(place: int) -> None:
            found[place] = list(serving.submit(requests[place]))

        def leave(place: int) -> None:
            handle = serving.submit(requests[place])
            next(iter(handle))
            handle.cancel()
            in_time = handle.new_tokens < requests[place].max_new_tokens  # threads are as late as the machine is busy
            assert handle.finish is (Finish.CANCELLED if in_time else Finish.LENGTH)

        threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(requests))]
        threads += [threading.Thread(target=leave, args=(place,)) for place in (3, 8, 10)]
        all_run(threads)
        assert [found[place] for place in range(len(requests))] == alone
        assert is_empty(serving)


def test_who_waits_is_told_that_somebody_else_has_cancelled(model, requests, monkeypatch):
    """Between two turns, and no other comes that could tell."""
    monkeypatch.setattr(Serving, "busy", False)
    with engine(model) as serving:
        handle = serving.submit(requests[0])
        waiting = threading.Thread(target=handle.result)
        waiting.start()
        while len(serving._news._waiters) < 2:  # the loop is the other
            time.sleep(0.01)
        handle.cancel()
        waiting.join(30)
        assert not waiting.is_alive()


def test_from_many_threads_without_one_of_its_own(model, requests, alone):
    """Whoever waits makes the turns, one at a time."""
    serving, found = engine(model), {}
    threads = [
        threading.Thread(target=lambda place=place: found.update({place: list(serving.submit(requests[place]))}))
        for place in range(len(requests))
    ]
    all_run(threads)
    assert [found[place] for place in range(len(requests))] == alone
    assert is_empty(serving)


def test_more_requests_than_may_wait(model, requests, alone):
    """`run` waits for room, and takes all back where one of them cannot be served."""
    serving = engine(model, slots=1, queue=1)
    assert [handle.tokens for handle in serving.run(requests[:5])] == alone[:5]
    with pytest.raises(NoRoom):
        serving.run([requests[0], Request(ids=[5] * 60, max_new_tokens=30)])
    assert is_empty(serving)


def test_a_turn_that_fails_and_a_cache_that_cannot_be_made_again(model, requests, alone, monkeypatch):
    """Everyone is told at once; the next request is told why, and when there is memory again it is served."""
    failing = [RuntimeError("out of memory\nand more")]

    def make(*arguments):
        if failing:
            raise failing[0]
        return Serving(*arguments)

    with engine(model) as serving:
        monkeypatch.setattr(engine_module, "Serving", make)
        monkeypatch.setattr(serving._serving, "launch", lambda *_: (_ for _ in ()).throw(failing[0]))
        with pytest.raises(Stopped, match=r"the engine stopped: out of memory$"):
            serving.submit(requests[0]).result()
        with pytest.raises(RuntimeError, match="out of memory"):
            serving.submit(requests[0])
        failing.clear()
        assert serving.submit(requests[0]).result() == alone[0]


def test_the_last_token_may_come_while_one_looks():
    """Between counting the tokens and asking whether there will be more."""

    class Late(list):
        def __len__(self):
            count = super().__len__()
            if handle.finish is None:
                self.append(7)
                handle.finish = Finish.LENGTH
            return count

    handle = Handle(None, lambda *_: None, lambda _: None)
    handle.tokens = Late()
    assert list(handle) == [7]


def test_a_row_that_comes_back_to_a_place_brings_what_it_has_said(model, requests):
    """Preempted twice it may find its own settings there, and a history without what it said elsewhere."""
    runner = engine(model)._serving.runner
    row = Row(5, requests[0], [4], prompt=1, reusable=1, total=1)
    asked = admitted(requests[0], model.config, 64)
    content = Content(row=row, request=asked, tokens=[4], tiles=[], feature_T=None)
    for row.slot in (2, 3):
        runner._move_in([content])
    assert runner._owner_S == [-1, -1, -1, 5]


def test_a_trace_goes_on_where_the_engine_begins_anew(model, requests):
    stream = io.StringIO()
    serving = engine(model, trace=stream)
    serving.run(requests[:2])
    serving.close()
    serving.run(requests[:2])
    assert len(list(replay(stream.getvalue().splitlines()))) > 20


def test_followers_are_told_before_all_look_for_what_is_not_finite(model, requests, monkeypatch):
    """It is computed, and on all devices."""
    serving, events = engine(model), []
    monkeypatch.setattr(multihost, "exchange", lambda message: events.extend(name for event in message for name in event))
    serving._leader = Leader()
    monkeypatch.setattr(Launched, "read", lambda self: [(part, [NOT_FINITE], None) for part in self.parts if part.samples])
    monkeypatch.setattr(serving._serving, "_explain", lambda served: events.append("explained") or "")
    handle = serving.submit(requests[0])
    while not handle.finish:
        serving.step()
    assert events[-2:] == ["deliver", "explained"]


def test_a_request_reaches_followers_as_it_was(model, requests):
    """As JSON, pictures in a message of their own; more of them than a message holds are refused."""
    told = [Request(ids=[5], max_new_tokens=3, sampling=Sampling(logit_bias={7: 1.5}, seed=3), deadline=2.0, grammar=Grammar(choice=["a"]))]
    for request in [*requests, *told]:
        asked = admitted(request, model.config, 64)
        again = admitted(from_json(json.loads(json.dumps(as_json(asked)))), model.config, 64)
        for name in ("ids", "tiles", "max_new_tokens", "sampling", "stop_ids", "deadline", "grammar"):
            np.testing.assert_equal(getattr(again, name), getattr(asked, name))
    many = dataclasses.replace(asked, tiles=np.broadcast_to(np.float32(0), (2**20, 3, SIDE, SIDE)))
    with pytest.raises(UserError, match=r"1048576 tiles of pictures are too many"):
        as_json(many)


def test_closing_ends_everyone(model, requests):
    """Who still waits is told, and the next request is served again."""
    serving = engine(model)
    with serving:
        handles = [serving.submit(request) for request in requests]
    assert all(handle.finish for handle in handles)
    unfinished = [handle for handle in handles if handle.finish is Finish.CANCELLED]
    assert unfinished
    with pytest.raises(UserError, match="the engine was closed"):
        unfinished[-1].result()
    assert is_empty(serving)
    assert len(serving.run(requests[:1])[0].tokens) == NEW


def test_a_stop_token_ends_a_request_and_is_not_part_of_it(model, requests, alone):
    stop = alone[0][5]
    asked = Request(ids=requests[0].ids, max_new_tokens=NEW, stop_ids=stop)
    serving = engine(model)
    (handle,) = serving.run([asked])
    assert handle.tokens == alone[0][: alone[0].index(stop)]
    assert handle.finish is Finish.STOP
    assert is_empty(serving)


def test_what_cannot_be_served(model, requests):
    """One clear error for that request, and nothing else is disturbed."""
    serving = engine(model, slots=1, pages=4, queue=1)
    with pytest.raises(NoRoom, match="the prompt has 60 tokens and up to 5 are asked for, but there is room for 64"):
        serving.submit(Request(ids=[5] * 60, max_new_tokens=5))
    with pytest.raises(NoRoom, match="but the cache holds 32"):
        serving.submit(Request(ids=[5] * 30, max_new_tokens=5))
    waiting = [serving.submit(requests[0])]
    serving.step()
    waiting.append(serving.submit(requests[1]))
    with pytest.raises(Full, match="1 requests wait already"):
        serving.submit(requests[2])
    late = engine(model).submit(Request(ids=[5, 6], max_new_tokens=NEW, stop_ids=(), deadline=0))
    assert late.result() == []
    assert late.finish is Finish.DEADLINE
    waiting[1].cancel()
    assert len(waiting[0].result()) == NEW
    assert waiting[1].result() == []
    assert is_empty(serving)


def test_an_interrupted_turn(model, requests, alone, monkeypatch):
    """Ctrl-C may fall between launching and reading: nobody knows then what the device holds, so it begins anew."""
    serving = engine(model)
    handle = serving.submit(requests[0])
    serving.step()
    with monkeypatch.context() as patch:
        patch.setattr(serving._serving, "deliver", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            handle.result()
    assert serving.run(requests[:2])[1].tokens == alone[1]
    assert handle.finish is Finish.CANCELLED
    assert is_empty(serving)


def test_a_new_cache_comes_when_the_old_one_is_gone(model, monkeypatch):
    """There is memory for one."""
    serving = engine(model)
    old = [weakref.ref(pages) for pages in jax.tree.leaves(serving._serving.runner.state)]
    made = []

    def make(*arguments):
        made.append([ref() for ref in old])
        return Serving(*arguments)

    monkeypatch.setattr(engine_module, "Serving", make)
    serving._restart()
    assert made == [[None] * len(old)]


def test_other_weights_forget_what_was_cached(requests):
    """A prefix of the old weights would go on in the new ones."""
    model = plain_model(num_hidden_layers=2)
    ids = requests[6].ids
    serving = engine(model)
    serving.run([Request(ids=ids, max_new_tokens=3, stop_ids=())])
    model.text.embedding.set_value(model.text.embedding[...][::-1])
    (handle,) = serving.run([Request(ids=ids, max_new_tokens=NEW, stop_ids=())])
    assert handle.cached_tokens == 0
    assert handle.tokens == generate(model, [ids], max_new_tokens=NEW, stop_ids=())[0]


def test_drafts_change_no_token(model, requests, alone):
    """Greedy or drawn, across chunk borders, with few pages, with pictures: a draft only makes tokens come sooner."""
    repeating = [
        Request(ids=[7, 8, 9, 10] * 4, max_new_tokens=NEW, stop_ids=(), sampling=s) for s in (Sampling(), Sampling(temperature=0.3))
    ]
    expected = [engine(model, slots=1, reuse=False).run([request])[0].tokens for request in repeating]
    for options in ({}, dict(pages=10)):
        serving = engine(model, draft=3, **options)
        handles = serving.run([*requests, *repeating])
        assert [handle.tokens for handle in handles] == [*alone, *expected]
        assert serving.drafted.proposed >= serving.drafted.accepted
        assert serving.drafted.steps > 0
        assert is_empty(serving)


def test_settings_beside_temperature_are_each_row_s_own(model, requests, alone):
    """Penalties, biases, minimum tokens and log-probabilities of one request leave the others what they are alone."""
    ids, first = requests[0].ids, alone[0]
    asked = [
        Request(ids=ids, max_new_tokens=NEW, stop_ids=(), sampling=Sampling(logit_bias={first[0]: -100})),
        Request(ids=ids, max_new_tokens=NEW, stop_ids=(), sampling=Sampling(presence_penalty=2.0, repetition_penalty=1.3)),
        Request(ids=ids, max_new_tokens=NEW, stop_ids=[first[2]], sampling=Sampling(min_tokens=8)),
        Request(ids=ids, max_new_tokens=NEW, stop_ids=(), sampling=Sampling(logprobs=3)),
    ]
    own = [engine(model, slots=1, reuse=False).run([request])[0].tokens for request in asked]
    serving = engine(model)
    handles = serving.run([*requests[:3], *asked, *requests[3:]])
    assert [handle.tokens for handle in handles] == [*alone[:3], *own, *alone[3:]]
    biased, penalized, patient, told = handles[3:7]
    assert first[0] not in biased.tokens
    assert len(set(penalized.tokens)) > len(set(first))
    assert len(patient.tokens) >= 8
    assert told.tokens == first
    assert len(told.logprobs) == NEW
    for token, (own_logprob, likeliest) in zip(told.tokens, told.logprobs, strict=True):
        assert len(likeliest) == 3
        assert likeliest[token] == own_logprob == max(likeliest.values())
    assert not handles[0].logprobs
    assert is_empty(serving)


def test_nothing_compiles_after_the_warm_up(model, requests, alone):
    """Pictures, drafts, penalties, scores of a prompt, copies of prefixes, preemption: every program is on a short list, and was run."""
    serving = engine(model, pages=10, draft=2)
    serving.warm_up(progress=False)
    told = Request(
        ids=requests[6].ids, max_new_tokens=4, sampling=Sampling(presence_penalty=1.0, logprobs=2, temperature=0.7), prompt_logprobs=1
    )
    with no_compilation():
        handles = serving.run([*requests, told, *requests[::-1]])
    assert [handle.tokens for handle in handles] == [*alone, handles[len(alone)].tokens, *alone[::-1]]
