"""Prefill and decode on a CPU against transformers and llama.cpp: same weights, measured in turn, best of several.

transformers has its mixture of experts replaced by one that computes only the routed tokens' experts; as it comes it computes
all experts for all tokens. llama.cpp is measured by its own `llama-batched-bench`.

    python benchmarks/cpu_against_peers.py
    python benchmarks/cpu_against_peers.py --llama-cpp FOLDER --dtype bfloat16

Needs the `test` extra, 12 GB of memory and 8 GB of temporary disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache, Llama4ForCausalLM, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

import maverick_jax as mj

TOLERANCE = 1e-4  # of float32 logits
STEPS = 64
THREADS = 2
CONFIG: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=512, intermediate_size=1024, intermediate_size_mlp=2048, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, num_local_experts=128, interleave_moe_layer_step=2, max_position_embeddings=8192,
    attention_chunk_size=8192, use_qk_norm=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip


class Task(NamedTuple):
    """What is measured: so many tokens, the seconds of transformers and ours."""

    what: str
    tokens: int
    theirs: Callable[[], float]
    ours: Callable[[], float]


def only_routed_experts(self: Llama4TextMoe, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward of the mixture that sorts tokens by expert and multiplies only what was routed."""
    x = hidden.reshape(-1, self.hidden_dim)
    scores = torch.nn.functional.linear(x, self.router.weight)
    value, expert = scores.max(dim=-1)
    order = torch.argsort(expert)
    rows = (x * torch.sigmoid(value)[:, None])[order]
    result, start = torch.empty_like(rows), 0
    # Apart at once: the gradient of an index into the stack would be as large as the stack, for each expert.
    gate_ups, downs = self.experts.gate_up_proj.unbind(), self.experts.down_proj.unbind()
    for index, count in enumerate(torch.bincount(expert, minlength=self.num_experts).tolist()):
        if count:
            gate, up = (rows[start : start + count] @ gate_ups[index]).chunk(2, dim=-1)
            result[start : start + count] = (up * self.experts.act_fn(gate)) @ downs[index]
            start += count
    return self.shared_expert(x).index_add(0, order, result), scores


def transformers_prefill(model: Llama4ForCausalLM, ids: np.ndarray) -> float:
    started = time.perf_counter()
    model(input_ids=torch.from_numpy(ids), use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started


def transformers_decode(model: Llama4ForCausalLM, ids: np.ndarray, steps: int) -> float:
    """Seconds of the quickest step."""
    cache = DynamicCache(config=model.config)
    token = model(input_ids=torch.from_numpy(ids), past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    times = [time.perf_counter()]
    for _ in range(steps):
        token = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        times.append(time.perf_counter())
    return min(after - before for before, after in pairwise(times))


def our_generation(model: mj.Llama4, draw: np.random.Generator, batch: int, prompt: int, new_tokens: int) -> float:
    """Seconds; the prompts are new each time, so that nothing is known of them."""
    rows = draw.integers(3, CONFIG["vocab_size"], (batch, prompt)).tolist()
    started = time.perf_counter()
    mj.generate(model, rows, max_new_tokens=new_tokens, stop_ids=())
    return time.perf_counter() - started


def our_decode(model: mj.Llama4, draw: np.random.Generator, batch: int, prompt: int) -> float:
    """Seconds per step: what `STEPS` more tokens cost."""
    first = our_generation(model, draw, batch, prompt, 1)
    return (our_generation(model, draw, batch, prompt, 1 + STEPS) - first) / STEPS


def make_models(dtype: str, args: argparse.Namespace, folder: Path) -> tuple[Llama4ForCausalLM, mj.Llama4]:
    """The same weights for all: transformers' model and ours, and in the folder llama.cpp's file, if it is wanted."""
    torch.manual_seed(0)
    setattr(Llama4TextMoe, "forward", only_routed_experts)  # noqa: B010 - a patched class, which a type checker refuses
    theirs = Llama4ForCausalLM._from_config(Llama4TextConfig(**CONFIG), dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    theirs.save_pretrained(folder)
    ours = mj.load(folder, dtype=dtype)
    if args.llama_cpp:
        llama_cpp.write_gguf(theirs, args.llama_cpp, folder / "model.gguf")
    if dtype == "float32":
        ids = np.random.default_rng(0).integers(3, CONFIG["vocab_size"], (1, 64))
        difference = np.abs(np.asarray(ours(ids.astype(np.int32))) - theirs(torch.from_numpy(ids)).logits.numpy()).max()
        assert difference < TOLERANCE, f"logits differ by {difference}"
    return theirs, ours


def measure(dtype: str, args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, list[float]]]:
    """(what, tokens/s of transformers, of llama.cpp if it is wanted, and of ours)."""
    theirs, ours = make_models(dtype, args, folder)
    draw = np.random.default_rng(0)
    ids = draw.integers(3, CONFIG["vocab_size"], (8, args.prompt))

    def decode(batch: int) -> Task:
        return Task(
            f"decode, batch {batch}",
            batch,
            lambda: transformers_decode(theirs, ids[:batch], 16),
            lambda: our_decode(ours, draw, batch, args.prompt),
        )

    prefill = Task(
        f"prefill of {args.prompt} tokens",
        args.prompt,
        lambda: transformers_prefill(theirs, ids[:1]),
        lambda: our_generation(ours, draw, 1, args.prompt, 1),
    )
    tasks = [prefill, decode(1), decode(8)]
    program = args.llama_cpp and llama_cpp.find_program(args.llama_cpp)
    rounds = []
    for _ in tqdm(range(1 + args.repeats), desc=dtype, leave=False):
        columns = [[task.theirs() for task in tasks], [task.ours() for task in tasks]]
        if program:
            columns.insert(1, llama_cpp.run(program, folder / "model.gguf", prompt=args.prompt, steps=STEPS, threads=THREADS))
        rounds.append(columns)
    best = np.min(rounds[1:], axis=0)  # the first round warms up
    for task, seconds in zip(tasks, best.T, strict=True):
        yield task.what, [task.tokens / s for s in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="prompt tokens (default: 512)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements of each, of which the best counts (default: 5)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="only this one (default: both)")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="sources of llama.cpp, built there (default: without it)")
    args = parser.parse_args()
    if args.llama_cpp:
        llama_cpp.find_program(args.llama_cpp)  # before anything is made
    torch.set_num_threads(THREADS)
    peers = ["transformers", *(["llama.cpp"] if args.llama_cpp else [])]
    print(f"| tokens/s | {' | '.join(peers)} | maverick-jax | of the best other |\n|{'---|' * (3 + len(peers))}")
    with torch.inference_mode():
        for dtype in (args.dtype,) if args.dtype else ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory() as folder:
                for what, speeds in measure(dtype, args, Path(folder)):
                    print(
                        f"| {dtype}, {what} | {' | '.join(f'{s:.1f}' for s in speeds)} | {speeds[-1] / max(speeds[:-1]):.2f} |", flush=True
                    )


if __name__ == "__main__":
    main()
