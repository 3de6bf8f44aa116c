"""A training step on a CPU against transformers: same weights, same batch, gradients of all of them, a step of gradient descent.

transformers has its mixture of experts replaced by one that computes only the routed tokens' experts, as in cpu_against_peers.py. Both
models have 128 experts, width 512 and 8 layers; a batch is 8 rows of 128 tokens. The losses of the first step must agree.

    python benchmarks/training_on_cpu.py

Needs the `test` and `train` extras, 16 GB of memory and 4 GB of temporary disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax
import torch
from cpu_against_peers import CONFIG, THREADS, only_routed_experts
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

import maverick_jax as mj
from maverick_jax.training.batch import Batch
from maverick_jax.training.next_token import NextToken
from maverick_jax.training.split import Split
from maverick_jax.training.step import begin, compile_update, make_update

ROWS, LENGTH, RATE = 8, 128, 1e-3
SAME = 1e-4  # relative, of the first losses


def batch_of(seed: int) -> Batch:
    ids = np.random.default_rng(seed).integers(3, CONFIG["vocab_size"], (ROWS, LENGTH)).astype(np.int32)
    weight = np.ones(ids.shape, np.float32)
    weight[:, -1] = 0
    return Batch(ids, np.full(ROWS, LENGTH, np.int32), np.roll(ids, -1, axis=1), weight)


def transformers_steps(folder: Path, steps: int) -> tuple[list[float], list[float]]:
    """Seconds and loss of every step."""
    torch.set_num_threads(THREADS)
    setattr(Llama4TextMoe, "forward", only_routed_experts)  # noqa: B010 - a patched class, which a type checker refuses
    torch.manual_seed(0)
    model = Llama4ForCausalLM._from_config(Llama4TextConfig(**CONFIG), dtype=torch.float32, attn_implementation="sdpa").train()
    model.save_pretrained(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    seconds, losses = [], []
    for step in range(steps):
        batch = batch_of(step)
        started = time.perf_counter()
        logits = model(input_ids=torch.tensor(batch.ids_BT, dtype=torch.long), use_cache=False).logits
        target = torch.tensor(batch.target_BT, dtype=torch.long)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), target[:, :-1].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return seconds, losses


def our_steps(folder: Path, steps: int) -> tuple[list[float], list[float]]:
    split, optimizer = Split(mj.load(folder, dtype="float32")), optax.sgd(RATE)
    progress = begin(split, optimizer)
    update = compile_update(make_update(split, NextToken(), optimizer), progress)
    seconds, losses = [], []
    for step in range(steps):
        batch = jax.tree.map(lambda x: x[None], batch_of(step))
        started = time.perf_counter()
        progress, measures = update(progress, split.frozen, batch)
        losses.append(float(measures["loss"]))
        jax.block_until_ready(progress)
        seconds.append(time.perf_counter() - started)
    return seconds, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="of each, of which the first warms up and the best counts (default: 5)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        theirs, their_losses = transformers_steps(Path(folder), args.steps)
        ours, our_losses = our_steps(Path(folder), args.steps)
    assert abs(their_losses[0] - our_losses[0]) < SAME * their_losses[0], (their_losses, our_losses)
    tokens = ROWS * LENGTH
    best_of_theirs, best_of_ours = (min(seconds[1:]) for seconds in (theirs, ours))
    print(f"losses of the steps: {their_losses} and {our_losses}")
    print("| tokens/s | transformers, sparse | maverick-jax | ratio |\n|---|---|---|---|")
    print(
        f"| float32, 8 x 128 tokens | {tokens / best_of_theirs:.0f} | {tokens / best_of_ours:.0f} | {best_of_theirs / best_of_ours:.2f} |"
    )


if __name__ == "__main__":
    main()
