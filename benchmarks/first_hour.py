"""What a newcomer waits for: the first and the second command, and a call of the model outside `jit` beside its compiled program.

The mini model, on one device and on eight simulated ones; every figure is the best of several, in seconds or milliseconds.

  python benchmarks/first_hour.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import numpy as np
from flax import nnx

import maverick_jax as mj

REPEATS, CALLS = 5, 20
QUESTION = ["-m", "maverick_jax", "generate", "Which digit is left?"]


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        first = seconds_of_command(cache)
        second = min(seconds_of_command(cache) for _ in range(REPEATS))
    print(f"maverick generate, a new process each: first {first:.1f} s, then {second:.1f} s")
    for name, mesh in (("one device", None), ("eight devices", mj.make_mesh(expert=8))):
        model = mj.load(mesh=mesh, dtype="float32")
        ids = np.array([[313, 306, 258, 305, 299, 258, 305, 299]])
        begin = time.perf_counter()
        model(ids).block_until_ready()
        compiling = time.perf_counter() - begin
        graphdef, state = nnx.split(model)
        program = jax.jit(lambda weights, ids, graphdef=graphdef: nnx.merge(graphdef, weights)(ids))
        program(state, ids).block_until_ready()
        turns = [(best_ms(partial(model, ids)), best_ms(partial(program, state, ids))) for _ in range(REPEATS)]
        call, compiled = map(min, zip(*turns, strict=True))
        print(
            f"{name}: first call {compiling:.1f} s, then {call:.2f} ms; its compiled program {compiled:.2f} ms: {call / compiled:.2f} times"
        )


def seconds_of_command(cache: str) -> float:
    begin = time.perf_counter()
    environment = os.environ | {"XDG_CACHE_HOME": cache, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    subprocess.run([sys.executable, *QUESTION], env=environment, check=True, capture_output=True)
    return time.perf_counter() - begin


def best_ms(call: Callable[[], jax.Array]) -> float:
    best = float("inf")
    for _ in range(CALLS):
        begin = time.perf_counter()
        call().block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return best * 1e3


if __name__ == "__main__":
    main()
