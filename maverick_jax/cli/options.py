"""Arguments that several subcommands share: which model on which devices, how to sample, and what to report."""

from __future__ import annotations

import argparse
import json
import math
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maverick_jax.inference.generate import Generation
    from maverick_jax.model import Llama4


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="DIR", help="model directory, Hugging Face directory or Hub id (default: the mini model)")
    parser.add_argument("--mesh", metavar="AXES", help="such as data=1,expert=8,tensor=1 (default: all devices on expert)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of weights and activations (default: as stored)")


def load_model(args: argparse.Namespace) -> Llama4:
    """The model that the arguments name, on its mesh."""
    from maverick_jax.checkpoint import load, resolve
    from maverick_jax.config import Config
    from maverick_jax.sharding import make_mesh, parse_mesh

    axes = parse_mesh(args.mesh) if args.mesh else default_mesh(Config.from_directory(resolve(args.model)))
    return load(args.model, mesh=make_mesh(**axes) if math.prod(axes.values()) > 1 else None, dtype=args.dtype)


def default_mesh(config: Any) -> dict[str, int]:
    """All devices on `expert`, or as many of them as divide the experts."""
    import jax

    return {"expert": math.gcd(jax.device_count(), config.text.num_local_experts)}


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token (default: 0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the tokens that together reach probability P")
    parser.add_argument("--min-p", type=float, metavar="P", help="sample among tokens at least P times as likely as the likeliest")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers (default: 0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object per answer instead of streaming")


def chat_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `Chat`."""
    names = ("system", "max_new_tokens", "stop", "temperature", "top_k", "top_p", "min_p", "seed")
    return {name: getattr(args, name) for name in names}


def speed(generation: Generation) -> str:
    """One line about a finished answer's cost."""
    seconds = generation.seconds
    return (
        f"{generation.prompt_tokens} prompt tokens in {seconds['prefill']:.2f} s, {generation.new_tokens} new tokens, "
        f"{generation.decode_rate:.1f} tokens/s; compilation {seconds['compile']:.1f} s"
    )


def as_json(text: str, generation: Generation) -> str:
    """An answer and its cost as one line of JSON."""
    values = {
        "text": text,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": generation.new_tokens,
        "seconds": {name: round(value, 4) for name, value in generation.seconds.items()},
        "tokens_per_second": round(generation.decode_rate, 2),
        "dropped": generation.dropped,
    }
    return json.dumps(values, ensure_ascii=False)


def quiet_accelerator_search() -> None:
    """jax logs that it looked for a TPU or GPU; people who have none need not read it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
