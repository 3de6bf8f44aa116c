"""An engine in several processes, real ones on this machine: process 0 alone is asked, and all compute."""

from __future__ import annotations

import json
import signal

import pytest

import maverick_jax as mj
from maverick_jax.sharding import roll_call
from oracle.adapted import teach
from processes import HARD_LIMIT_S, MAVERICK, half_of_the_mini_model

COMES_AND_GOES = """
import json, sys, threading
import numpy as np
import maverick_jax as mj
from maverick_jax.inference.sampling import Sampling
from maverick_jax.sharding import multihost

multihost.initialize()
mesh = mj.make_mesh(data=2, expert=2, tensor=2)
model = mj.load("half", mesh=mesh, dtype="float32")
engine = mj.Engine(model, slots=2, max_length=48, draft=int(sys.argv[1]), adapters={"law": "law"})
random = np.random.default_rng(0)
vision = model.config.vision
shared = random.integers(100, 300, 20).tolist()
asked = []
for i in range(8):
    ids, tiles = (shared[: 12 + i % 8] if i % 3 == 0 else random.integers(100, 300, random.integers(1, 20)).tolist()), None
    if i % 4 == 1:
        tiles = random.uniform(-1, 1, (1, 3, vision.image_size, vision.image_size)).astype(np.float32)
        ids = [5, *[model.config.image_token_index] * vision.tokens_per_tile, *ids]
    sampling = Sampling(logit_bias={7: 1.5} if i == 5 else None, logprobs=1 if i == 2 else None)
    deadline = 0.0 if i == 7 else None
    grammar = mj.Grammar(choice=["four", "seven"]) if i == 6 else None
    rest = dict(deadline=deadline, grammar=grammar, adapter="law" if i % 3 == 0 else None)
    asked.append(mj.Request(ids=ids, tiles=tiles, max_new_tokens=6, sampling=sampling, stop_ids=(), **rest))

def by_hand():
    "Requests arrive and are cancelled at random between the turns."
    waiting, handles = list(asked), []
    while waiting or not all(handle.finish for handle in handles):
        if waiting and random.random() < 0.6:
            handles.append(engine.submit(waiting.pop(0)))
        if random.random() < 0.15 and handles:
            handles[random.integers(min(5, len(handles)))].cancel()
        engine.step()
    return handles

def threaded():
    "The same from threads of their own, while the engine has one."
    handles = [None] * len(asked)
    def ask(i):
        handles[i] = engine.submit(asked[i])
        for _ in handles[i]:
            pass
    with engine:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return handles

for way in (by_hand,) if engine.limits.draft else (by_hand, threaded):
    handles = engine.lead(way) if multihost.is_first() else engine.follow()
    for handle in handles or ():
        print(json.dumps([handle.finish.value, handle.tokens]), flush=True)
    engine._serving.scheduler.check()
    assert engine._serving.scheduler.idle and not engine._serving.by_number
together = engine.run(asked[:3])  # and again each process for itself
print(json.dumps(["together", [handle.tokens for handle in together]]), flush=True)
"""
FOLLOWS = """
import sys
import maverick_jax as mj
from maverick_jax.sharding import multihost

with multihost.joined():
    mesh = mj.make_mesh(data=2, expert=2, tensor=2)
    slots = 2 + multihost.process_index() * (sys.argv[1] == "differ")
    engine = mj.Engine(mj.load("half", mesh=mesh), slots=slots, max_length=64)

    def serve():
        for token in engine.submit(mj.Request(ids=[5, 6], max_new_tokens=40, stop_ids=())):
            print("ready", flush=True)
            if sys.argv[1] == "raise":
                raise RuntimeError("no luck")

    engine.lead(serve) if multihost.is_first() else engine.follow()
    print("over")
"""


def lines(out: str) -> list:
    """What a process printed; gloo prints lines of its own."""
    return [json.loads(line) for line in out.splitlines() if line.startswith('["')]


@pytest.mark.parametrize("draft", [0, 3])
def test_requests_that_come_and_go(start, tmp_path, draft):
    """Two processes give the tokens of one, with adapters, pictures, cancellation, a deadline, a form and drafts, from threads too."""
    half_of_the_mini_model(tmp_path / "half")
    adapted = mj.load(tmp_path / "half")
    mj.add_adapters(adapted, {"attention": 2, "experts": 1})
    teach(adapted)
    mj.save_adapter(adapted, tmp_path / "law")
    said = []
    for count in (2, 1):
        flags = f"--xla_force_host_platform_device_count={8 // count}"
        run = start([("-c", COMES_AND_GOES, draft)] * count, XLA_FLAGS=flags)
        assert run.statuses(5 * HARD_LIMIT_S) == [0] * count, run.err(0) + run.err(count - 1)
        said.append(lines(run.out(0)))
        if count == 2:
            assert lines(run.out(1)) == said[0][-1:]
    for (finish, tokens), (other_finish, others) in zip(*said, strict=True):
        if "cancelled" in (finish, other_finish):  # how far it had come by then is a matter of time
            shorter = min(len(tokens), len(others))
            assert tokens[:shorter] == others[:shorter]
        else:
            assert (finish, tokens) == (other_finish, others)
    finishes = [finish for finish, _ in said[0]]
    assert len(finishes) == (9 if draft else 17)
    assert {"length", "deadline", "stop"} < set(finishes)


def test_a_batch_of_two_processes(start, tmp_path):
    """One writes the results, and both compute them."""
    half_of_the_mini_model(tmp_path / "half")
    asked = [{"custom_id": f"{n}", "method": "POST", "url": "/v1/completions"} for n in range(3)]
    lines = [json.dumps(one | {"body": {"prompt": "What is", "max_tokens": 2 + n}}) for n, one in enumerate(asked)]
    (tmp_path / "in").write_text("\n".join(lines))
    words = ("batch", "-m", "half", "--mesh", "expert=4,tensor=2", "--slots", "2", "--max-length", "64", "--quiet", "in")
    results = []
    for count in (2, 1):
        flags = f"--xla_force_host_platform_device_count={8 // count}"
        run = start([(*MAVERICK, *words, f"out-{count}-{process}") for process in range(count)], XLA_FLAGS=flags)
        assert run.statuses() == [0] * count, run.err(0) + run.err(count - 1)
        written = map(json.loads, (tmp_path / f"out-{count}-0").read_text().splitlines())
        results.append({line["custom_id"]: line["response"]["body"]["choices"] for line in written})
    assert not (tmp_path / "out-2-1").exists()
    assert results[0] == results[1]
    assert sorted(results[0]) == ["0", "1", "2"]


def test_another_engine_elsewhere_is_an_error_before_anything_compiles(start, tmp_path):
    half_of_the_mini_model(tmp_path / "half")
    run = start([("-c", FOLLOWS, "differ")] * 2)
    assert run.statuses() == [roll_call.MISTAKE] * 2
    for process in (0, 1):
        assert "the engine's slots is 2 on process 0, 3 on process 1" in run.err(process)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_run(start, tmp_path, victim):
    half_of_the_mini_model(tmp_path / "half")
    run = start([("-c", FOLLOWS, "go on")] * 2)
    run.wait_for("ready", 0)
    run.processes[victim].send_signal(signal.SIGKILL)
    assert run.statuses(60)[victim] == -signal.SIGKILL
    if victim == 1:  # with process 0 jax's service dies, which may abort the other one before it says so
        assert run.one_line(0).startswith("maverick: process 0 of 2: process 1 is gone without a word")


def test_an_error_of_process_0_ends_the_run(start, tmp_path):
    half_of_the_mini_model(tmp_path / "half")
    run = start([("-c", FOLLOWS, "raise")] * 2)
    assert run.statuses(60) == [roll_call.LOST] * 2
    assert run.one_line(1) == "maverick: process 1 of 2: process 0 failed: no luck"
