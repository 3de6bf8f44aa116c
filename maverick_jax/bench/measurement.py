"""Measure how fast an engine serves a model: batches of several sizes, and requests that come at random.

Every program runs before it is timed, so that nothing compiles while it is. A batch's prompts are read twice: once for one token each,
which times the prefill, and again from the cache, so that all of its rows decode side by side.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from maverick_jax.bench.floors import case_of, decode_floor, prefill_floor
from maverick_jax.bench.loads import arrivals, ask, decoding, random_prompts, serve
from maverick_jax.bench.machine import Machine, machine_of
from maverick_jax.bench.report import Batch, Quantiles, Random, Report
from maverick_jax.config import TextConfig
from maverick_jax.errors import UserError
from maverick_jax.inference.admission import check_model
from maverick_jax.inference.checks import Range, listed, names_the_nearest, real, shown, whole
from maverick_jax.inference.clock import seconds_compiling
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.room import room_for
from maverick_jax.model import Llama4
from maverick_jax.sharding import multihost

BATCH = Range(whole, 1, 4096, "a whole number, 1 to 4,096 requests")
PROMPT = Range(whole, 1, float("inf"), "a whole number, 1 or more")
NEW = Range(whole, 2, float("inf"), "a whole number, 2 or more")
RATE = Range(real, 1e-3, 1e6, "requests per second, 0.001 to 1,000,000")
REQUESTS = Range(whole, 1, 2**20, "a whole number, 1 to 1,048,576")
WARM_UPS = 2  # on a GPU the second run of a program is slower than the third


@names_the_nearest
def measure(
    model: Llama4,
    *,
    batches: Sequence[int] = (1, 8, 64),
    prompt: int = 512,
    new: int = 64,
    rate: float | None = None,
    requests: int = 64,
) -> Report | None:
    """Serve prompts of random tokens and time it. In a run of several processes process 0 does, and the others get None.

    Args:
      batches: requests that are served side by side; the largest is the engine's number of slots.
      prompt, new: tokens of each prompt, and of each answer.
      rate: requests per second that come at random, independently of each other; None: only the batches.
      requests: how many of them.

    Raises:
      UserError: no model, a number out of its range, or more than there is room for.
    """
    check_model(model)
    sizes = _batches(batches)
    prompt, new = PROMPT.check("prompt", prompt), NEW.check("new", new)
    if rate is not None:
        rate, requests = RATE.check("rate", rate), REQUESTS.check("requests", requests)
    engine = _engine(model, sizes[-1], prompt, new, queue=max(requests, sizes[-1]))
    if rate is not None:
        engine.warm_up(extras=False)  # what comes at random may need any program
    machine = machine_of(model.text.embedding[...].devices(), model.text.embedding.dtype)
    if not multihost.is_first():
        return engine.follow()

    def timed() -> Report:
        found = [_batch(engine, machine, size, prompt, new) for size in sizes]
        random = None if rate is None else _random(engine, rate, requests, prompt, new)
        return Report(machine.said, case_of(model, machine, sizes[-1], prompt + new), prompt, new, tuple(found), random)

    return engine.lead(timed)


def _batches(batches: Sequence[int]) -> list[int]:
    given = listed(batches)
    if not given:
        raise UserError(f"batches is {shown(batches)}: expected a list of whole numbers, such as [1, 8, 64].")
    return sorted({BATCH.check("batch", size) for size in given})


def _engine(model: Llama4, slots: int, prompt: int, new: int, queue: int) -> Engine:
    text: TextConfig = model.config.text
    length, longest = prompt + new, text.max_position_embeddings
    if length > longest:
        raise UserError(f"prompt {prompt} and new {new} are {length:,} tokens, but the model's context holds {longest:,}: ask for less.")
    geometry = room_for(model, slots=slots, max_length=length).geometry
    if geometry.pages < slots * geometry.stretches:
        most = geometry.pages // geometry.stretches
        raise UserError(f"batch {slots} does not fit: there is memory for {most} requests of {length:,} tokens. Ask for a smaller batch.")
    # A page more for each: while a prompt is read again, the end of its first reading is still there.
    return Engine(model, slots=slots, max_length=length, pages=geometry.pages + slots, queue=queue)


def _batch(engine: Engine, machine: Machine, size: int, prompt: int, new: int) -> Batch:
    config = engine.model.config
    compiling, read, decoded = 0.0, [], []
    for run in range(WARM_UPS + 1):
        prompts = random_prompts(config, size, prompt, seed=run)
        began = time.perf_counter()
        read = serve(engine, [ask(ids, 1) for ids in prompts])
        decoded = serve(engine, [ask(ids, new) for ids in prompts])
        compiling = seconds_compiling(began)
    tokens, seconds = decoding(decoded)
    if not tokens:
        raise UserError(f"new {new} is too short for batch {size}: the first answers ended before the last began. Ask for more.")
    case = case_of(engine.model, machine, size, prompt + new)
    took = max(timed.tokens[0] for timed in read)
    floor, step_floor, step = prefill_floor(case, prompt), decode_floor(case, prompt, new), size * seconds / tokens
    return Batch(
        size=size,
        prefill_rate=size * prompt / took,
        prefill_bytes=floor.memory / took,
        prefill_products=floor.compute / took,
        first=Quantiles.of([timed.first for timed in read]),
        decode_rate=tokens / seconds,
        decode_bytes=step_floor.memory / step,
        decode_products=step_floor.compute / step,
        between=Quantiles.of([gap for timed in decoded for gap in timed.between]),
        compiling=compiling,
    )


def _random(engine: Engine, rate: float, requests: int, prompt: int, new: int) -> Random:
    prompts = random_prompts(engine.model.config, requests, prompt, seed=WARM_UPS + 1)
    began = time.perf_counter()
    served = serve(engine, [ask(ids, new) for ids in prompts], arrivals(requests, rate, seed=0))
    compiling = seconds_compiling(began)
    seconds = max(timed.tokens[-1] for timed in served)
    return Random(
        rate=rate,
        requests=requests,
        served_rate=requests / seconds,
        token_rate=requests * new / seconds,
        first=Quantiles.of([timed.first for timed in served]),
        between=Quantiles.of([gap for timed in served for gap in timed.between]),
        compiling=compiling,
    )
