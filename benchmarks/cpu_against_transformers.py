"""Prefill and decode on a CPU against transformers: same weights, same process, measured in turn, best of several.

The peer is transformers with its mixture of experts replaced by one that computes only the routed tokens' experts; stock
transformers computes all experts for all tokens.

    python benchmarks/cpu_against_transformers.py

Needs the `test` extra, 12 GB of memory and 4 GB of temporary disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache, Llama4ForCausalLM, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

import maverick_jax as mj
from maverick_jax.inference.generate import STEPS, Generation

TOLERANCE = 1e-4
CONFIG: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=512, intermediate_size=1024, intermediate_size_mlp=2048, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, num_local_experts=128, interleave_moe_layer_step=2, max_position_embeddings=8192,
    attention_chunk_size=8192, use_qk_norm=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip


def only_routed_experts(self: Llama4TextMoe, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward of the mixture that sorts tokens by expert and multiplies only what was routed."""
    x = hidden.reshape(-1, self.hidden_dim)
    scores = torch.nn.functional.linear(x, self.router.weight)
    value, expert = scores.max(dim=-1)
    order = torch.argsort(expert)
    rows = (x * torch.sigmoid(value)[:, None])[order]
    result, start = torch.empty_like(rows), 0
    for index, count in enumerate(torch.bincount(expert, minlength=self.num_experts).tolist()):
        if count:
            gate, up = (rows[start : start + count] @ self.experts.gate_up_proj[index]).chunk(2, dim=-1)
            result[start : start + count] = (up * self.experts.act_fn(gate)) @ self.experts.down_proj[index]
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


def our_prefill(model: mj.Llama4, ids: np.ndarray) -> float:
    generation = Generation(model, ids.tolist(), max_new_tokens=1, stop_ids=())
    list(generation)
    return generation.seconds["prefill"]


def our_decode(model: mj.Llama4, ids: np.ndarray, steps: int) -> float:
    """Seconds per step of the quickest call of several steps."""
    portions = iter(Generation(model, ids.tolist(), max_new_tokens=steps + 1, stop_ids=()))
    next(portions)
    times = [time.perf_counter(), *(time.perf_counter() for _ in portions)]
    return min(after - before for before, after in pairwise(times)) / STEPS


def in_turn(repeats: int, theirs: Callable[[], float], ours: Callable[[], float]) -> tuple[float, float]:
    """Best seconds of each; both are warmed up, then measured alternately, so that a busy machine disturbs both."""
    for warm_up in (theirs, ours):
        warm_up()
    pairs = [(theirs(), ours()) for _ in tqdm(range(repeats), leave=False)]
    return min(theirs for theirs, _ in pairs), min(ours for _, ours in pairs)


def measure(args: argparse.Namespace) -> Iterator[tuple[str, float, float]]:
    """(what, their tokens/s, our tokens/s)."""
    torch.manual_seed(0)
    setattr(Llama4TextMoe, "forward", only_routed_experts)  # noqa: B010 - a patched class, which a type checker refuses
    theirs = Llama4ForCausalLM._from_config(Llama4TextConfig(**CONFIG), dtype=torch.float32, attn_implementation="sdpa").eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = mj.load(directory, dtype="float32")
    draw = np.random.default_rng(0)
    short = draw.integers(3, CONFIG["vocab_size"], (1, 64))
    difference = np.abs(np.asarray(ours(short.astype(np.int32))) - theirs(torch.from_numpy(short)).logits.numpy()).max()
    assert difference < TOLERANCE, f"logits differ by {difference}"
    ids = draw.integers(3, CONFIG["vocab_size"], (8, args.prompt))
    prefill = in_turn(args.repeats, lambda: transformers_prefill(theirs, ids[:1]), lambda: our_prefill(ours, ids[:1]))
    yield f"prefill of {args.prompt} tokens", args.prompt / prefill[0], args.prompt / prefill[1]
    for batch in (1, 8):
        rows = ids[:batch]
        decode = in_turn(
            args.repeats, lambda rows=rows: transformers_decode(theirs, rows, 16), lambda rows=rows: our_decode(ours, rows, 4 * STEPS)
        )
        yield f"decode, batch {batch}", batch / decode[0], batch / decode[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="prompt tokens (default: 512)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements of each, of which the best counts (default: 5)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    print("| float32, 128 experts, 8 layers | transformers, tokens/s | maverick-jax, tokens/s | ratio |\n|---|---|---|---|")
    with torch.inference_mode():
        for what, theirs, ours in measure(args):
            print(f"| {what} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
