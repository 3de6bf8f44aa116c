"""Arguments that all kinds of training share, and the objects that they stand for."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maverick_jax.cli import interrupt
from maverick_jax.cli.parser import positive, real, whole
from maverick_jax.errors import UserError

if TYPE_CHECKING:
    from maverick_jax.config import Config
    from maverick_jax.model import Llama4
    from maverick_jax.training.data.examples import Reading
    from maverick_jax.training.data.pipeline import Batches, Rows
    from maverick_jax.training.held_out import HeldOut
    from maverick_jax.training.optimization import Optimization
    from maverick_jax.training.trainer import Loop

REMAT, READERS = ("none", "products", "layers"), ("peft", "vllm")  # refused before a model is loaded
PARTS = ("attention", "dense", "shared", "experts")
LEARNING_RATE, OF_ALL = 2e-4, 1e-5  # of adapters, of all weights


def add_learning_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=positive, default=16, metavar="N", help="of the adapters (default: 16)")
    parser.add_argument("--expert-rank", type=positive, default=4, metavar="N", help="of the routed experts' adapters (default: 4)")
    parser.add_argument("--alpha", type=real, default=32.0, metavar="A", help="adapters are scaled by A / --rank (default: 32)")
    parser.add_argument(
        "--adapt",
        default=",".join(PARTS),
        metavar="LIST",
        help=f"what gets adapters: {', '.join(PARTS)}, router, unembedding, vision (default: the first four)",
    )
    parser.add_argument("--full", action="store_true", help="learn the weights themselves, without adapters")
    parser.add_argument(
        "--freeze", action="append", default=[], metavar="PATTERN", help="parameters that stay, such as 'vision.*'; repeatable"
    )
    parser.add_argument("--master", action="store_true", help="keep what --full learns in float32, whatever the model computes in")
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="rows of a micro-batch (default: 8)")
    parser.add_argument("--length", type=positive, default=2048, metavar="N", help="tokens of a row (default: 2048, or the context)")
    parser.add_argument(
        "--learning-rate", type=real, metavar="R", help=f"the highest (default: {LEARNING_RATE:g} for adapters, {OF_ALL:g} with --full)"
    )
    parser.add_argument("--schedule", default="cosine", metavar="S", help="cosine or linear, to a tenth; constant (default: cosine)")
    parser.add_argument("--warmup", type=real, default=0.03, metavar="SHARE", help="of the steps (default: 0.03)")
    parser.add_argument("--weight-decay", type=real, default=0.0, metavar="W", help="of matrices (default: 0)")
    parser.add_argument("--clip", type=real, default=1.0, metavar="N", help="largest norm of the gradients (default: 1)")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of new adapters and of the order of the data (default: 0)")
    parser.add_argument("--remat", choices=REMAT, default="none", help="what the gradient makes again, to save memory (default: none)")
    parser.add_argument("--save-every", type=positive, default=100, metavar="N", help="steps between checkpoints (default: 100)")
    parser.add_argument("--keep", type=positive, default=2, metavar="N", help="checkpoints that stay (default: 2)")
    parser.add_argument("--for", dest="reader", choices=READERS, default="peft", help="what is to read the adapter (default: peft)")


def add_conversation_arguments(parser: argparse.ArgumentParser) -> None:
    """For what learns from a file of conversations, of which a part may be held out."""
    parser.add_argument("--steps", type=positive, metavar="N", help="of the optimizer (default: --epochs)")
    parser.add_argument("--epochs", type=real, default=1.0, metavar="N", help="times through the data (default: 1)")
    parser.add_argument("--accumulate", type=positive, default=1, metavar="N", help="micro-batches of a step (default: 1)")
    parser.add_argument(
        "--long", default="drop", metavar="HOW", help="examples beyond --length: drop, cut-start or cut-end (default: drop)"
    )
    parser.add_argument("--skip-bad", action="store_true", help="pass over lines that are no conversation, and count them")
    parser.add_argument("--hold-out", type=real, metavar="SHARE", help="of the rows: not learned from, but looked at (default: none)")
    parser.add_argument("--look-every", type=positive, default=20, metavar="N", help="steps between looks at them (default: 20)")
    parser.add_argument("--patience", type=positive, default=3, metavar="N", help="looks without a lower loss that end it (default: 3)")


@dataclasses.dataclass(frozen=True)
class Start:
    """What every kind of training begins with, before a model is loaded."""

    out: Path
    directory: Path
    config: Config
    reading: Reading
    length: int


def start(args: argparse.Namespace) -> Start:
    from maverick_jax.checkpoint import resolve
    from maverick_jax.config import Config
    from maverick_jax.training.data.files import reading_of
    from maverick_jax.training.run import check_place

    out = Path(args.out)
    check_place(out)
    directory = resolve(args.model)
    config = Config.from_directory(directory)
    interrupt.hint(f"{out} has checkpoints: run the same command again to go on.")
    return Start(out, directory, config, reading_of(directory, config), min(args.length, config.text.max_position_embeddings))


def batches(rows: Rows, args: argparse.Namespace) -> tuple[Batches, HeldOut | None]:
    """What is learned from, and what is looked at."""
    from maverick_jax.training.data.pipeline import Batches, Order
    from maverick_jax.training.held_out import HeldOut, apart

    order = Order(args.batch, args.accumulate, args.seed)
    if args.hold_out is None:
        return Batches(rows, order), None
    if not 0 < args.hold_out < 1:
        raise UserError(f"--hold-out is {args.hold_out:g}: give a share between 0 and 1.")
    learned, looked_at = apart(len(rows), args.hold_out, args.batch, args.seed)
    return Batches(rows, order, learned), HeldOut(rows(looked_at), args.look_every, args.patience)


def prepare(model: Llama4, args: argparse.Namespace) -> None:
    """New adapters, unless there are some or --full asks for none."""
    from maverick_jax.model.low_rank import adapters, add_adapters

    if args.full:
        if adapters(model):
            raise UserError("--full learns all weights, and --adapter names an adapter: merge it by `maverick export --merge` first.")
        return
    if adapters(model):
        return
    parts = [part.strip() for part in args.adapt.split(",")]
    there = {"experts": bool(model.config.text.moe_layers), "shared": bool(model.config.text.moe_layers)}
    dense = len(model.config.text.moe_layers) < model.config.text.num_hidden_layers
    chosen = [part for part in parts if there.get(part, dense if part == "dense" else True)]
    add_adapters(
        model,
        {part: args.expert_rank if part == "experts" else args.rank for part in chosen},
        scale=args.alpha / args.rank,
        seed=args.seed,
    )


def steps(args: argparse.Namespace, steps_per_epoch: float) -> int:
    if not args.epochs > 0:
        raise UserError(f"--epochs is {args.epochs:g}: give a number above 0.")
    return args.steps or max(1, round(args.epochs * steps_per_epoch))


def optimization(args: argparse.Namespace, steps: int) -> Optimization:
    from maverick_jax.training.optimization import Optimization

    rate = args.learning_rate if args.learning_rate is not None else OF_ALL if args.full else LEARNING_RATE
    return Optimization(steps, rate, args.schedule, args.warmup, args.weight_decay, args.clip)


def loop(args: argparse.Namespace, flops_per_step: float = 0.0) -> Loop:
    from maverick_jax.training.trainer import Loop

    return Loop(args.save_every, args.keep, args.remat, progress(args), flops_per_step, peak_flops())


def progress(args: argparse.Namespace) -> bool:
    """Whether bars are wanted."""
    return not (args.quiet or args.json)


def peak_flops() -> float | None:
    """Of all devices in bfloat16, if their kind is known."""
    import jax

    from maverick_jax.bench.machine import KINDS
    from maverick_jax.plan.chips import CHIPS

    chip = CHIPS.get(KINDS.get(jax.devices()[0].device_kind, ""))
    return None if chip is None else chip.flops * jax.device_count()


def keep(model: Llama4, args: argparse.Namespace, out: Path) -> None:
    """Write what was learned, an adapter or a model, and say where it is."""
    from maverick_jax.adapter import save_adapter
    from maverick_jax.checkpoint import save

    place = out / ("model" if args.full else "adapter")
    if not place.exists():
        save(model, place) if args.full else save_adapter(model, place, layout=args.reader)
    print(json.dumps({"out": str(out), "learned": str(place)}) if args.json else place)


def unseen(model: Llama4, pictures: bool) -> list[str]:
    """The vision tower, where no example has a picture: weight decay would wear it away."""
    from flax import nnx

    from maverick_jax.model.parameter import parameter_name

    if model.config.vision is None or pictures:
        return []
    names = [parameter_name(path) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    return [pattern for pattern in ("vision.*", "projector*") if fnmatch.filter(names, pattern)]


def digest_of(data: str) -> str:
    """Of what is in a file; what is none is its own name."""
    file = Path(data)
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else data


def identity(model: Llama4, args: argparse.Namespace, *, own: Sequence[str]) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that began.

    Args:
      own: arguments of this kind of training, by their names.
    """
    from maverick_jax.adapter import norms_of

    names = ("batch", "length", "seed", "rank", "expert_rank", "alpha", "adapt", "full", "master", "freeze", *own)
    asked = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    kind = {"kind of training": args.kind.__module__.rpartition(".")[2]}
    return {**kind, "base (by its norms)": norms_of(model), "data": digest_of(args.data), "dtype": model.text.embedding.dtype.name, **asked}
