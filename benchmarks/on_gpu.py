"""What a GPU makes of the real shapes: one run under eight minutes, in which the card's own ceilings are measured first.

The grouped products of a layer of Maverick beside those of torch, tokamax (where they are installed) and `lax.ragged_dot`; decoding and
reading prompts through the engine, with a few layers of Maverick at full width and random weights, and through transformers where that is
installed; the vision tower. What fails is said in its row, and the others go on.

examples:
  python benchmarks/on_gpu.py --json on_gpu.json > on_gpu.md
  python benchmarks/on_gpu.py --part products --part decode --dtype fp8
  JAX_PLATFORMS=cpu python benchmarks/on_gpu.py --tiny        # does it run at all?
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants some of the memory

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gpu_peers import transformers_rows
from jax import lax
from random_models import cut, random_array, random_model, random_weight

from maverick_jax.bench import measure
from maverick_jax.config import Config
from maverick_jax.errors import first_line
from maverick_jax.inference import steps
from maverick_jax.model import Llama4
from maverick_jax.model.compiled import take_apart
from maverick_jax.model.quantized import inputs_together
from maverick_jax.ops import grouped_matmul_hopper
from maverick_jax.ops.grouped_matmul import grouped_matmul
from maverick_jax.ops.quantize import FLOAT8, FORMATS, QuantizedArray, Weight, matrix_shape
from maverick_jax.ops.toolkit import HOPPER

PARTS = ("products", "decode", "prefill", "vision", "transformers")
REPEATS = 10
MOSAIC = "ours, MAVERICK_GPU_KERNELS=mosaic"


class Sizes(NamedTuple):
    """What is measured."""

    config: Config
    stack: tuple[int, int, int]
    rows: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]
    prefill: tuple[tuple[int, int], ...]
    tiles: tuple[int, ...]
    new: int
    product: int
    copied: int


def real(layers: int) -> Sizes:
    """Maverick's first layers: half of them mixtures, one in four without chunks."""
    return Sizes(
        config=cut(Config.maverick(), layers),
        stack=(128, 5120, 8192),
        rows=(64, 256, 1024, 8192, 32768),
        decode=((1, 1024), (8, 1024), (64, 1024), (256, 1024), (64, 8192)),
        prefill=((1, 512), (1, 2048), (1, 8192), (4, 2048), (8, 8192), (1, 32768), (1, 131072)),
        tiles=(1, 8, 16),
        new=48,
        product=8192,
        copied=2**32,
    )


def tiny() -> Sizes:
    config = Config.maverick()
    text = dict(hidden_size=64, intermediate_size=32, intermediate_size_mlp=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    text = dataclasses.replace(config.text, **text, vocab_size=512, num_local_experts=8, attention_chunk_size=64)
    return Sizes(
        cut(dataclasses.replace(config, text=text, vision=None), 2), (8, 64, 32), (8, 64), ((2, 32),), ((2, 96),), (), 4, 128, 2**20
    )


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Of a call, the best of several; on a GPU the first two of a program are slower."""
    best = math.inf
    for _ in range(REPEATS + 2):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        best = min(best, time.perf_counter() - began)
    return best


class Ceilings(NamedTuple):
    """What the card does at most, per second: bytes, of a copy, and operations, of a product in bfloat16."""

    memory: float
    products: float

    @classmethod
    def measured(cls, sizes: Sizes) -> Ceilings:
        matrix = jax.random.normal(jax.random.key(0), (sizes.product, sizes.product), jnp.bfloat16)
        products = 2 * sizes.product**3 / seconds(jax.jit(jnp.matmul), matrix, matrix)
        numbers = jnp.ones(sizes.copied // 2, jnp.bfloat16)
        return cls(2 * numbers.nbytes / seconds(jnp.copy, numbers), products)


Row = dict[str, Any]


def products(sizes: Sizes, dtypes: list[str], ceilings: Ceilings) -> Iterator[Row]:
    """A grouped product of one stack: bytes of the experts that have rows, and operations."""
    E, K, _ = sizes.stack
    for dtype in dtypes:
        weight = random_weight(dtype, sizes.stack)
        per_expert = sum(leaf.nbytes for leaf in jax.tree.leaves(weight)) / E
        forms: dict[str, Callable] = {"ours": jax.jit(grouped_matmul)}
        if is_hopper():
            forms[MOSAIC] = functools.partial(grouped_matmul_hopper.product, transposed=False)
        if dtype == "bfloat16":
            forms["lax.ragged_dot"] = jax.jit(lax.ragged_dot)
            if importlib.util.find_spec("tokamax"):
                forms["tokamax"] = jax.jit(importlib.import_module("tokamax").ragged_dot)
        if isinstance(weight, QuantizedArray) and weight.values.dtype == FLOAT8:
            forms["ours, FP8 activations"] = by_float8_rows(weight)
        for rows in sizes.rows:
            counts = np.bincount(np.random.default_rng(0).integers(0, E, rows), minlength=E)
            operands = random_array(1, (rows, K), jnp.dtype("bfloat16")), weight, jnp.asarray(counts, jnp.int32)
            about = {"dtype": dtype, "rows": rows}
            for form, function in forms.items():
                if form != "lax.ragged_dot" or rows <= 1024:  # it multiplies every row by every matrix
                    timed = functools.partial(seconds, function, *operands)
                    yield about | {"by": form} | product_cost(timed, counts, per_expert, weight, ceilings)
        if isinstance(weight, jax.Array):
            yield from matrix_gradients(sizes, weight, ceilings)
        del weight
        if dtype in ("bfloat16", "fp8"):
            yield from torch_products(sizes, dtype, per_expert, ceilings)


def by_float8_rows(weight: QuantizedArray) -> Callable:
    """The product with its rows in float8, by a stack that is laid for it."""
    laid = dataclasses.replace(weight, values=inputs_together(jnp.copy(weight.values)), float8_rows=True)
    return lambda x, _, counts: jax.jit(grouped_matmul)(x, laid, counts)


def matrix_gradients(sizes: Sizes, weight: jax.Array, ceilings: Ceilings) -> Iterator[Row]:
    """Bytes of the gradient, and operations."""
    E, K, N = weight.shape

    def gradient(x, dy, counts):
        return jax.vjp(lambda w: grouped_matmul(x, w, counts), weight)[1](dy)[0]

    forms: dict[str, Callable] = {"ours": jax.jit(gradient)}
    if is_hopper():
        forms[MOSAIC] = grouped_matmul_hopper.outer_products
    rows = sizes.rows[-1]
    counts = np.bincount(np.random.default_rng(0).integers(0, E, rows), minlength=E)
    operands = *(random_array(n, (rows, width), weight.dtype) for n, width in ((1, K), (2, N))), jnp.asarray(counts, jnp.int32)
    for form, function in forms.items():
        spent = cost(functools.partial(seconds, function, *operands), weight.nbytes, 2.0 * rows * K * N, ceilings)
        yield {"dtype": "bfloat16, gradient", "rows": rows, "by": form} | spent


def is_hopper() -> bool:
    return getattr(jax.devices()[0], "compute_capability", None) == HOPPER


def product_cost(timed: Callable[[], float], counts, per_expert: float, weight: Weight, ceilings: Ceilings) -> Row:
    _, K, N = matrix_shape(weight)
    return cost(timed, (counts > 0).sum() * per_expert, 2.0 * counts.sum() * K * N, ceilings)


def cost(timed: Callable[[], float], moved: float, operations: float, ceilings: Ceilings) -> Row:
    """Time, rates, and shares of the ceilings; or why there is none."""
    try:
        took = timed()
    except Exception as error:
        return {"failed": first_line(error)[:120]}
    return {
        "microseconds": round(1e6 * took, 1),
        "TB/s": round(moved / took / 1e12, 2),
        "TFLOP/s": round(operations / took / 1e12, 1),
        "of memory": round(moved / took / ceilings.memory, 2),
        "of products": round(operations / took / ceilings.products, 2),
    }


def torch_products(sizes: Sizes, dtype: str, per_expert: float, ceilings: Ceilings) -> Iterator[Row]:
    """torch's own: bfloat16 as ours; of FP8 the activations are in FP8 too, with a scale per row."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        return
    E, K, N = sizes.stack
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float8_e4m3fn
    weight = torch.empty(E, N, K, device="cuda", dtype=kind)
    for expert in range(E):
        weight[expert] = torch.randn(N, K, device="cuda").to(kind)
    weight_EKN = weight.transpose(1, 2)
    for rows in sizes.rows:
        counts = np.bincount(np.random.default_rng(0).integers(0, E, rows), minlength=E)
        padded = counts if dtype == "bfloat16" else -(-counts // 16) * 16
        ends = torch.tensor(np.cumsum(padded), device="cuda", dtype=torch.int32)
        x = torch.randn(int(padded.sum()), K, device="cuda").to(kind)

        def timed(x=x, ends=ends):
            scales = torch.ones(len(x), device="cuda"), torch.ones(E, N, device="cuda")
            best = math.inf
            for _ in range(REPEATS + 2):
                torch.cuda.synchronize()
                began = time.perf_counter()
                if dtype == "bfloat16":
                    torch._grouped_mm(x, weight_EKN, offs=ends)  # type: ignore - private in torch 2.11 and 2.13
                else:
                    like = {"offs": ends, "out_dtype": torch.bfloat16, "use_fast_accum": True}
                    torch._scaled_grouped_mm(x, weight_EKN, *scales, **like)  # type: ignore - so is this
                torch.cuda.synchronize()
                best = min(best, time.perf_counter() - began)
            return best

        name = "torch grouped_mm" if dtype == "bfloat16" else "torch scaled_grouped_mm, FP8 activations"
        row = cost(timed, (counts > 0).sum() * per_expert, 2.0 * rows * K * N, ceilings)
        yield {"dtype": dtype, "rows": rows, "by": name} | row


def decode(model: Llama4, sizes: Sizes, dtype: str, ceilings: Ceilings) -> Iterator[Row]:
    """Through the engine, the host's loop included; beside the bytes that a step reads."""
    for batch, context in sizes.decode:
        yield {"dtype": dtype, "batch": batch, "context": context} | served(model, batch, context, sizes.new, "decode", ceilings)


def prefill(model: Llama4, sizes: Sizes, dtype: str, ceilings: Ceilings) -> Iterator[Row]:
    """All prompts, until the last of them has its first token."""
    for batch, tokens in sizes.prefill:
        yield {"dtype": dtype, "prompts": batch, "tokens": tokens} | served(model, batch, tokens, 2, "prefill", ceilings)


def served(model: Llama4, batch: int, prompt: int, new: int, phase: str, ceilings: Ceilings) -> Row:
    try:
        report = measure(model, batches=[batch], prompt=prompt, new=new)
        assert report is not None
        found, chip = report.batches[0], report.case.topology.chip
    except Exception as error:
        return {"failed": first_line(error)[:120]}
    decoding = phase == "decode"
    tokens, rate = (batch, found.decode_rate) if decoding else (batch * prompt, found.prefill_rate)
    of_bytes = found.decode_bytes if decoding else found.prefill_bytes
    of_products = found.decode_products if decoding else found.prefill_products
    return {
        "microseconds": round(1e6 * tokens / rate, 1),
        "tokens/s": round(rate, 1),
        "of memory": round(of_bytes * chip.bandwidth / ceilings.memory, 2),
        "of products": round(of_products * chip.flops / ceilings.products, 2),
    }


def vision(model: Llama4, sizes: Sizes, ceilings: Ceilings) -> Iterator[Row]:
    """The tower alone."""
    config = sizes.config.vision
    if config is None or model.vision is None:
        return
    D, F, P = config.hidden_size, config.intermediate_size, config.grid**2 + 1
    inner, outer, shuffled = config.projector_input_dim, config.projector_output_dim, D * config.shuffle**2
    per_tile = config.num_hidden_layers * (2 * P * (4 * D * D + 2 * D * F) + 4 * P * P * D)
    per_tile += config.tokens_per_tile * 2 * (shuffled * inner + inner * outer)
    structure, leaves = take_apart(model)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model.vision)))
    for tiles in sizes.tiles:
        pixels = jnp.zeros((tiles, config.num_channels, config.image_size, config.image_size), jnp.float32)
        yield {"tiles": tiles} | cost(
            functools.partial(seconds, steps.encode, structure, leaves, pixels), weights, float(tiles * per_tile), ceilings
        )


def table(rows: list[Row]) -> str:
    """Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([f"{row.get(name, '')}" for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="what to measure (default: everything)")
    parser.add_argument("--dtype", choices=("bfloat16", *FORMATS), action="append", help="of the experts (default: all, models in two)")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of Maverick (default: 4: 71 GB in bfloat16, 38 in fp8)")
    parser.add_argument("--json", metavar="FILE", help="write everything there too")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that all of it runs")
    args = parser.parse_args()
    sizes, parts = tiny() if args.tiny else real(args.layers), args.part or PARTS
    began, device = time.perf_counter(), jax.devices()[0]
    ceilings = Ceilings.measured(sizes)
    rates = f"copies {ceilings.memory / 1e12:.2f} TB/s, products {ceilings.products / 1e12:.0f} TFLOP/s"
    print(f"{device.device_kind}, jax {jax.__version__}: {rates}")
    found: dict[str, list[Row]] = {}

    def note(part: str, rows: Iterator[Row]) -> None:
        found.setdefault(part, []).extend(rows)

    if "products" in parts:
        note("products", products(sizes, args.dtype or ["bfloat16", *FORMATS], ceilings))
    for dtype in args.dtype or ["bfloat16", "fp8"] if {"decode", "prefill", "vision"} & set(parts) else ():
        model = random_model(sizes.config, dtype)
        if "decode" in parts:
            note("decode", decode(model, sizes, dtype, ceilings))
        if "prefill" in parts:
            note("prefill", prefill(model, sizes, dtype, ceilings))
        if "vision" in parts and "vision" not in found:
            note("vision", vision(model, sizes, ceilings))
        del model
    if "transformers" in parts:
        note("transformers", transformers_rows(sizes.config, tiny=args.tiny))
    for part, rows in found.items():
        print(f"\n{part}\n\n{table(rows)}")
    print(f"\n{time.perf_counter() - began:.0f} s")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"device": device.device_kind, "jax": jax.__version__, "ceilings": ceilings._asdict(), **found}, file, indent=1)


if __name__ == "__main__":
    main()
