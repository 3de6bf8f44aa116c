"""What the engine's loop costs: beside a static batch, beside a long prompt, for prefixes that nobody shares, for answers in a form,
and on the host.

All but the last measure the mini model, alternately and several times, and the best of each counts. The last has tiny layers but as many
arrays as the whole Maverick (1,085), and counts the CPU time of the engine's thread alone.

examples:
  python benchmarks/engine_load.py
  python benchmarks/engine_load.py host --repeats 5
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

import maverick_jax as mj
from maverick_jax.bench.loads import ask, random_prompts
from maverick_jax.config import Config
from maverick_jax.inference.admission import admitted
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.grammar import Grammar
from maverick_jax.inference.request import Request, Row
from maverick_jax.inference.runner import Content
from maverick_jax.inference.sampling import Sampling
from maverick_jax.inference.scheduling.plans import Call, Part, Plan
from maverick_jax.model.llama4 import Llama4

TOGETHER = 32
MEAN_PROMPT, MEAN_NEW = 64, 64
ROUNDS = 4  # of requests, in the continuous load, for each of the static batch


def mixed(config: Config, seed: int) -> list[Request]:
    """Prompts and answers of half to one and a half times the mean."""
    draw = np.random.default_rng(seed)
    prompts = draw.integers(MEAN_PROMPT // 2, MEAN_PROMPT * 3 // 2 + 1, ROUNDS * TOGETHER)
    answers = draw.integers(MEAN_NEW // 2, MEAN_NEW * 3 // 2 + 1, ROUNDS * TOGETHER)
    lengths = zip(prompts.tolist(), answers.tolist(), strict=True)
    return [ask(random_prompts(config, 1, prompt, seed + i)[0], new) for i, (prompt, new) in enumerate(lengths)]


def continuous(engine: Engine, seed: int) -> float:
    """New tokens per second of mixed requests, always so many at a time: the next one comes in when one has ended."""
    requests = mixed(engine.model.config, seed)
    began = time.perf_counter()
    handles = engine.run(requests)
    return sum(handle.new_tokens for handle in handles) / (time.perf_counter() - began)


def static(engine: Engine, seed: int) -> float:
    """New tokens per second of equal requests that begin and end together: the same programs without scheduler or delivery.

    Every row has its place and pages from the beginning; nothing is read before the last step is launched.
    """
    runner, limits, config = engine._serving.runner, engine.limits, engine.model.config
    stretches = -(-limits.max_length // limits.page)
    table = tuple((slot, j, slot * stretches + j) for slot in range(TOGETHER) for j in range(stretches))
    prompts = random_prompts(config, TOGETHER, MEAN_PROMPT, seed)
    contents = {}
    for slot, ids in enumerate(prompts):
        request = admitted(ask(ids, MEAN_NEW), config, limits.max_length)
        row = Row(slot, request, ids.tolist(), prompt=len(ids), reusable=0, total=len(ids), slot=slot)
        contents[slot] = Content(row=row, request=request, tokens=ids.tolist(), tiles=[], feature_T=None)
    piece = min(limits.chunk or MEAN_PROMPT, MEAN_PROMPT)
    began = time.perf_counter()
    launched = []
    for start in range(0, MEAN_PROMPT, piece):
        last = start + piece == MEAN_PROMPT
        for first in range(0, TOGETHER, 16):
            parts = tuple(Part(slot, slot, start, piece, last, 0) for slot in range(first, first + 16))
            plan = Plan(table_changes=() if start or first else table, calls=(Call("prefill", parts, 16, piece, start == 0),))
            launched += [runner.draw(forwarded, contents) for forwarded in runner.forward(plan, contents) if forwarded.drawing]
    for step in range(1, MEAN_NEW):
        parts = tuple(Part(slot, slot, MEAN_PROMPT + step - 1, 1, True, step) for slot in range(TOGETHER))
        plan = Plan(calls=(Call("decode", parts, TOGETHER, 1, False),))
        launched += [runner.draw(forwarded, contents) for forwarded in runner.forward(plan, contents)]
    drawn = sum(len(tokens) for one in launched for _, tokens, _ in one.read())
    assert drawn == TOGETHER * MEAN_NEW
    return drawn / (time.perf_counter() - began)


def in_batches(engine: Engine, seed: int) -> float:
    """New tokens per second of the same mixed requests in static batches: nobody comes in before all have ended."""
    requests = mixed(engine.model.config, seed)
    began = time.perf_counter()
    handles = [handle for at in range(0, len(requests), TOGETHER) for handle in engine.run(requests[at : at + TOGETHER])]
    return sum(handle.new_tokens for handle in handles) / (time.perf_counter() - began)


def beside_a_static_batch(repeats: int) -> Iterator[str]:
    model = mj.load()
    length = (MEAN_PROMPT + MEAN_NEW) * 3 // 2 + 1
    engines = [Engine(model, slots=TOGETHER, max_length=length, reuse=False) for _ in range(3)]
    rates = [(continuous(engines[0], s), in_batches(engines[1], s), static(engines[2], s)) for s in range(repeats + 2)][2:]
    ours, same, equal = (max(rate) for rate in zip(*rates, strict=True))
    what = f"32 mixed requests at a time | {ours:,.0f} tokens/s"
    yield f"{what}; the same in static batches {same:,.0f}; {ours / same:.0%} | at least 85 %"
    yield f"{what}; a static batch of equal ones, by hand {equal:,.0f}; {ours / equal:.0%} | "


def streams(engine: Engine, seed: int) -> tuple[float, float]:
    """Seconds per token of eight streams, alone and while a prompt of 16 times their length is read.

    Alone they are measured before and after: a token takes longer the more come before it.
    """
    config, long = engine.model.config, 16 * MEAN_PROMPT
    requests = [ask(ids, 1900) for ids in random_prompts(config, 8, MEAN_PROMPT, seed)]
    handles = [engine.submit(request) for request in requests]

    def steps(until: Callable[[], bool]) -> float:
        began, before = time.perf_counter(), min(handle.new_tokens for handle in handles)
        while not until():
            engine.step()
        return (time.perf_counter() - began) / (min(handle.new_tokens for handle in handles) - before)

    steps(lambda: min(handle.new_tokens for handle in handles) >= 20)
    before = steps(lambda: min(handle.new_tokens for handle in handles) >= 120)
    late = engine.submit(ask(random_prompts(config, 1, long, seed + 1000)[0], 2))
    beside = steps(lambda: late.new_tokens > 0 or any(handle.finish for handle in handles))
    assert late.new_tokens > 0, "the streams ended first"
    steps(lambda: late.finish is not None)
    until = min(handle.new_tokens for handle in handles) + 100
    after = steps(lambda: min(handle.new_tokens for handle in handles) >= until)
    for handle in [*handles, late]:
        handle.cancel()
    return (before + after) / 2, beside


def beside_a_long_prompt(repeats: int) -> Iterator[str]:
    engine = Engine(mj.load(), slots=16, max_length=2048)
    times = [streams(engine, seed) for seed in range(repeats + 2)][2:]
    alone, beside = min(times, key=lambda both: both[1] / both[0])
    ratios = sorted(b / a for a, b in times)
    yield (
        f"eight streams beside a prompt 16 times as long | {1000 * alone:.2f} ms per token alone, {1000 * beside:.2f} beside it; "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f} times, median {np.median(ratios):.2f} | at most 1.5 times"
    )


def reuse(repeats: int) -> Iterator[str]:
    model = mj.load()
    engines = [Engine(model, slots=TOGETHER, max_length=512, reuse=on) for on in (True, False)]
    best = [float("inf"), float("inf")]
    for seed in range(repeats + 2):
        requests = [ask(ids, 4) for ids in random_prompts(model.config, 2 * TOGETHER, 256, seed)]
        for i, engine in enumerate(engines):
            began = time.perf_counter()
            engine.run([dataclasses.replace(request) for request in requests])
            if seed >= 2:
                best[i] = min(best[i], time.perf_counter() - began)
    on, off = best
    yield f"64 random prompts of 256 tokens | {on:.3f} s with reuse, {off:.3f} without; {on / off - 1:+.1%} | at most +2 %"


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "when": {"type": "string", "format": "date-time"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 3, "maxItems": 6},
        "values": {"type": "array", "items": {"type": "number", "minimum": -10, "maximum": 10}, "minItems": 5, "maxItems": 12},
    },
    "required": ["name", "when", "tags", "values"],
    "additionalProperties": False,
}


def forms(repeats: int) -> Iterator[str]:
    """Answers that a schema holds to a form, beside as many tokens of answers that are free, drawn alike."""
    model = mj.load()
    engine = Engine(model, slots=TOGETHER, max_length=512, reuse=False)
    rates = []
    for seed in range(repeats + 2):
        free = [
            dataclasses.replace(ask(ids, 300), sampling=Sampling(temperature=1.0, seed=i))
            for i, ids in enumerate(random_prompts(model.config, 2 * TOGETHER, MEAN_PROMPT, seed))
        ]
        lengths, rate = [300] * len(free), []
        for form in (Grammar(json_schema=SCHEMA), None):
            asked = [dataclasses.replace(r, grammar=form, max_new_tokens=n) for r, n in zip(free, lengths, strict=True)]
            began = time.perf_counter()
            handles = engine.run(asked)
            lengths = [max(1, handle.new_tokens) for handle in handles]
            rate.append(sum(lengths) / (time.perf_counter() - began))
        rates.append(rate)
    formed, free = (max(rate) for rate in zip(*rates[2:], strict=True))
    what = "64 answers in the form of a schema, 32 at a time"
    yield f"{what} | {formed:,.0f} tokens/s, {free:,.0f} without; {formed / free:.0%} | at least 90 %"


def many_arrays() -> Llama4:
    """Maverick's layers with next to nothing in them."""
    whole = Config.maverick()
    text = dataclasses.replace(
        whole.text, vocab_size=256, hidden_size=16, intermediate_size=8, intermediate_size_mlp=16, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_local_experts=2, attention_chunk_size=64, max_position_embeddings=1024,
    )  # fmt: skip
    assert whole.vision is not None
    vision = dataclasses.replace(
        whole.vision, hidden_size=16, intermediate_size=64, num_attention_heads=2, vision_output_dim=16, projector_input_dim=16,
        projector_output_dim=16,
    )  # fmt: skip
    from flax import nnx

    return Llama4(dataclasses.replace(whole, text=text, vision=vision, image_token_index=255, eos_token_id=(1,)), rngs=nnx.Rngs(0))


def host_seconds(engine: Engine, rows: int, seed: int) -> float:
    """Seconds per step that the engine's thread computes, while all rows decode."""
    prompts = random_prompts(engine.model.config, rows, 8, seed)
    handles = [engine.submit(ask(ids, 80)) for ids in prompts]
    while not all(handle.tokens for handle in handles):
        engine.step()
    spent = []
    for _ in range(40):
        began = time.thread_time()
        engine.step()
        spent.append(time.thread_time() - began)
    for handle in handles:
        handle.cancel()
    engine.step()
    return float(np.median(spent))


def call_seconds(model: Llama4) -> float:
    """Seconds of the thread that calls a program with the model's arrays, one by one, which does nothing with them."""
    leaves = jax.tree.leaves(model)
    nothing = jax.jit(lambda *leaves: leaves[0], keep_unused=True)
    spent = []
    for _ in range(100):
        began = time.thread_time()
        nothing(*leaves)
        spent.append(time.thread_time() - began)
    return float(np.median(spent))


def on_the_host(repeats: int) -> Iterator[str]:
    model = many_arrays()
    engine, leaves = Engine(model, slots=64, max_length=128), len(jax.tree.leaves(model))
    for rows in (1, 16, 64):
        times = [(host_seconds(engine, rows, seed), call_seconds(model)) for seed in range(repeats + 2)][2:]
        step, call = (1000 * min(both) for both in zip(*times, strict=True))
        most = 0.3 + 0.005 * rows
        yield f"host per step, {leaves:,} arrays, {rows} rows | {step:.2f} ms; an empty call {call:.2f} | at most {most:.2f} ms"


PARTS = {"static": beside_a_static_batch, "streams": beside_a_long_prompt, "reuse": reuse, "forms": forms, "host": on_the_host}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements of each, of which the best counts (default: 5)")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no {', '.join(unknown)}")
    print("| what | measured | goal |", "|---|---|---|", sep="\n")
    for part in args.parts or PARTS:
        for line in PARTS[part](args.repeats):
            print(f"| {line} |", flush=True)


if __name__ == "__main__":
    main()
