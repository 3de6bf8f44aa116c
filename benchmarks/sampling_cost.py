"""What choosing a token costs, by settings, as a multiple of the most likely token: vocabulary of Llama 4, all in one process.

Each line is compared with a greedy step of the same program, and with the plain way, `argmax` behind `isfinite`. The logits are
normally distributed: with a deviation of 3 the most likely ones stand out as in a language model, with 1 they are nearly flat.

examples:
  python benchmarks/sampling_cost.py
  python benchmarks/sampling_cost.py --batch 8 --repeats 50
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

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
}
HEADER = "| batch | deviation | settings | ms | of greedy | of plain argmax |\n|---|---|---|---|---|---|"


def seconds(call: Callable[..., Any], *arguments: Any, repeats: int) -> float:
    """The quickest of several calls."""
    best = float("inf")
    for _ in range(repeats + 1):  # the first one compiles
        started = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        best = min(best, time.perf_counter() - started)
    return best


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
        steps = jnp.zeros(batch, jnp.int32)
        for deviation in (3.0, 1.0):
            logits = jax.random.normal(jax.random.key(0), (batch, VOCABULARY)) * deviation
            argmax, greedy = seconds(plain, logits, repeats=args.repeats), 0.0
            for name, settings in SETTINGS.items():
                took = seconds(choose, logits, RowSampling.repeat(Sampling(**settings), batch), steps, repeats=args.repeats)
                greedy = greedy or took
                print(f"| {batch} | {deviation:g} | {name} | {took * 1e3:.2f} | {took / greedy:.1f} | {took / argmax:.1f} |", flush=True)
        none = jnp.zeros((batch, VOCABULARY), jnp.int32)
        mask = jnp.full((batch, VOCABULARY // 32), 0xFFFFFFFF, jnp.uint32)
        extras = jax.device_put(Extras(RowExtras.repeat(Sampling(frequency_penalty=0.5), batch), none, mask))
        took = seconds(choose, logits, RowSampling.repeat(Sampling(), batch), steps, extras, repeats=args.repeats)
        print(
            f"| {batch} | {deviation:g} | greedy, penalties and a mask | {took * 1e3:.2f} | {took / greedy:.1f} | {took / argmax:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
