"""What choosing a token costs, by settings, as a multiple of the most likely token: vocabulary of Llama 4, all in one process.

The ratios are of processor time: to a greedy step of the same program, and to the plain way, `argmax` behind `isfinite`. The logits
are normally distributed: with a deviation of 3 the most likely ones stand out as in a language model, with 1 they are nearly flat.

examples:
  python benchmarks/sampling_cost.py
  python benchmarks/sampling_cost.py --batch 8 --repeats 50
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maverick_jax.inference.sampling import NOT_FINITE, Extras, RowExtras, RowSampling, Sampling, sample

VOCABULARY = 202_048
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": dict(),
    "temperature": dict(temperature=1.0),
    "min-p 0.1": dict(temperature=1.0, min_p=0.1),
    "top-k 50": dict(temperature=1.0, top_k=50),
    "top-k 50, top-p 0.9": dict(temperature=1.0, top_k=50, top_p=0.9),
    "top-p 0.9": dict(temperature=1.0, top_p=0.9),
    "top-k 5,000": dict(temperature=1.0, top_k=5000),
    "top-k 5,000, top-p 0.9": dict(temperature=1.0, top_k=5000, top_p=0.9),
    "greedy, penalties and a mask": dict(),
}
HEADER = "| batch | deviation | settings | ms | processor ms | of greedy | of plain argmax |\n|---|---|---|---|---|---|---|"


class Cost(NamedTuple):
    """The quickest of several calls, in milliseconds: by the clock, and of all threads together, which other work disturbs less."""

    wall: float
    processor: float


def cost(call: Callable[..., Any], *arguments: Any, repeats: int) -> Cost:
    calls = []
    for _ in range(repeats + 1):  # the first one compiles
        wall, processor = time.perf_counter(), time.process_time()
        jax.block_until_ready(call(*arguments))
        calls.append(Cost((time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3))
    return Cost(*map(min, zip(*calls, strict=True)))


@jax.jit
def plain(logits_BV: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(logits_BV).all(axis=-1), jnp.argmax(logits_BV, axis=-1), NOT_FINITE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, action="append", help="rows (default: 1 and 32)")
    parser.add_argument("--repeats", type=int, default=20, help="calls of each, of which the quickest counts")
    args = parser.parse_args()
    choose = jax.jit(sample)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, vocabulary {VOCABULARY:,}\n\n{HEADER}")
    for batch in args.batch or (1, 32):
        no_history = jnp.zeros((batch, VOCABULARY), jnp.int32)
        all_allowed = jnp.full((batch, VOCABULARY // 32), 0xFFFFFFFF, jnp.uint32)
        extras = jax.device_put(Extras(RowExtras.repeat(Sampling(frequency_penalty=0.5), batch), no_history, all_allowed))
        steps = jnp.zeros(batch, jnp.int32)
        for deviation in (3.0, 1.0):
            logits = jax.random.normal(jax.random.key(0), (batch, VOCABULARY)) * deviation
            argmax, greedy = cost(plain, logits, repeats=args.repeats), None
            for name, settings in SETTINGS.items():
                rows = RowSampling.repeat(Sampling(**settings), batch)
                took = cost(choose, logits, rows, steps, extras if name.endswith("mask") else None, repeats=args.repeats)
                greedy = greedy or took
                ratios = f"{took.processor / greedy.processor:.1f} | {took.processor / argmax.processor:.1f}"
                print(f"| {batch} | {deviation:g} | {name} | {took.wall:.2f} | {took.processor:.2f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
