"""Will a model fit, and how fast can it be: memory per device and a roofline, for devices that need not be there. The
limits assume that every byte moves and every product is made at the chip's full rate; docs/planning.md has the formulas. With --train it is
a step of `maverick train` that is planned: what is learned, its moments and gradients, and what the backward pass keeps.

examples:
  maverick plan --topology v6e:8x8
  maverick plan --topology h100:8 --dtype fp8 --batch 64 --context 8192
  maverick plan --topology h100:8x2 --batch 128 --search
  maverick plan --model scout --topology v5p:2x2x2 --mesh expert=2,tensor=4 --layout latency
  maverick plan --topology v6e:8x8 --batch 256 --search
  maverick plan --topology v6e:8x8 --mesh expert=8,tensor=8 --compile
  maverick plan --train qlora --topology h100:8
  maverick plan --train lora --topology h200:8 --mesh expert=8 --length 4096 --batch 16 --accumulate 4
  maverick plan --train full --master --topology v5p:4x4x8 --mesh data=2,expert=32,tensor=2
  maverick plan --topology h200:8 --dtype fp8 --json | jq .decode.tokens_per_second
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from maverick_jax.cli import options
from maverick_jax.cli.parser import given

PRESETS = ("maverick", "scout")
TRAINING = (
    ("length", "8192, or what the model takes", "tokens of a row"),
    ("accumulate", "1", "micro-batches of a step"),
    ("rank", "16", "of the adapters"),
    ("expert-rank", "4", "of the routed experts' adapters"),
)


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", default="maverick", metavar="MODEL", help="maverick, scout, or a directory such as ./maverick (default: maverick)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--topology", required=True, help="TPU slice or GPUs, such as v6e:8x8, v5p:4x4x4, h100:8 or, two hosts, h100:8x2")
    parser.add_argument("--mesh", metavar="AXES", help="such as expert=8,tensor=8 (default: the fastest that fits)")
    parser.add_argument("--layout", help="throughput or latency (default: throughput; with --search: all; with --train: training)")
    parser.add_argument(
        "--dtype", help="bfloat16, float32, or routed experts in fp8, int8 or int4 (default: bfloat16; with --train qlora: int4)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="B",
        help="rows that decode together (default: 64), or of a micro-batch (default: one for each share of the devices)",
    )
    parser.add_argument(
        "--context", type=int, metavar="T", help="tokens that each row has room for (default: 8192, or what the model takes)"
    )
    parser.add_argument("--search", action="store_true", help="compare the meshes that divide and fit, the best first")
    parser.add_argument("--compile", action="store_true", help="ask the real compiler about the decode step (extra tpu or cuda13; no chip)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    training = parser.add_argument_group("training")
    training.add_argument("--train", type=given, metavar="KIND", help="lora; qlora, beside quantized routed experts; or full, all weights")
    for name, default, help in TRAINING:
        training.add_argument(f"--{name}", type=int, metavar="N", help=f"{help} (default: {default})")
    training.add_argument("--master", action="store_true", help="full: what is learned is kept in float32")
    training.add_argument("--remat", type=given, metavar="HOW", help="what the gradient makes again: layers (default), products or none")
    parser.add_argument("--plot", metavar="FILE", help="draw memory per device and the limit over batch (of a search: of the best)")


def run(args: argparse.Namespace) -> int:
    options.quiet_accelerator_search()
    from maverick_jax.errors import UserError
    from maverick_jax.plan.plot import check_plot

    if args.search and args.mesh is not None:
        raise UserError("--search tries every mesh: leave out --mesh.")
    of_training = {name: getattr(args, name) for name in ("length", "accumulate", "rank", "expert_rank", "master", "remat")}
    given = {name: value for name, value in of_training.items() if value is not None and value is not False}
    if args.train is None and given:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} is a setting of training: say what is trained by --train.")
    if args.plot is not None:
        check_plot(args.plot)
    return _answer(args) if args.train is None else _train(args, given)


def _answer(args: argparse.Namespace) -> int:
    """Plan a model that answers."""
    from maverick_jax.errors import UserError
    from maverick_jax.plan import make_plan, search
    from maverick_jax.plan.plot import save_plot
    from maverick_jax.plan.report import search_table

    if args.compile:
        _check_compiler(args.topology)
    config = model_config(args.model)
    chosen = {name: getattr(args, name) for name in ("dtype", "batch") if getattr(args, name) is not None}
    question = {"topology": args.topology, "layout": args.layout, "context": args.context, **chosen}
    plans = search(config, **question) if args.search else [make_plan(config, mesh=_mesh(args), **question)]
    best = plans[0]
    if not best.fits:
        raise UserError(f"model {args.model} {best.refusal}")
    if args.plot is not None:
        save_plot(best, args.plot, model=_name(args))
    compiled = _compile(best) if args.compile else None
    if args.json:
        values = {"plans": [plan.as_dict() for plan in plans]} if args.search else best.as_dict()
        print(json.dumps(values | ({"compiled": compiled.as_dict()} if compiled else {})))
    else:
        print(search_table(plans) if args.search else best)
        if compiled:
            print(f"\n{compiled}")
    return 0


def _train(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """Plan a model that learns."""
    from maverick_jax.errors import UserError
    from maverick_jax.plan.training import make_training_plan
    from maverick_jax.plan.training.plot import save_training_plot

    for name, cure in (("search", "the best mesh is taken"), ("compile", "the decode step is compiled"), ("context", "give --length")):
        if getattr(args, name):
            raise UserError(f"--{name} is not for --train: {cure}.")
    question = {"topology": args.topology, "layout": args.layout, "dtype": args.dtype, "batch": args.batch, **given}
    plan = make_training_plan(model_config(args.model), training=args.train, mesh=_mesh(args), **question)
    if not plan.fits:
        raise UserError(f"training {args.train} of model {args.model} {plan.refusal}")
    if args.plot is not None:
        save_training_plot(plan, args.plot, model=_name(args))
    print(json.dumps(plan.as_dict()) if args.json else plan)
    return 0


def _mesh(args: argparse.Namespace) -> dict[str, int] | None:
    from maverick_jax.sharding import parse_mesh

    return None if args.mesh is None else parse_mesh(args.mesh)


def _name(args: argparse.Namespace) -> str:
    """The model's, for a picture."""
    return args.model if args.model in PRESETS else Path(args.model).resolve().name


def _check_compiler(topology: str) -> None:
    """Whether it is there and knows these devices, before there is anything to compile."""
    import jax

    from maverick_jax.plan.targets import devices_of
    from maverick_jax.plan.topology import Topology

    jax.config.update("jax_platforms", "cpu")  # compiling needs no accelerator, and takes none from others
    devices_of(Topology.parse(topology))


def _compile(plan):
    """The decode step of a plan (of a search: of the best) by the real compiler."""
    from maverick_jax.plan.compiled import compile_decode

    print(f"compiling the decode step of {plan.case.topology.name} …", file=sys.stderr)
    return compile_decode(plan.case)


def model_config(model: str):
    """A preset by its name; anything else is a directory."""
    from maverick_jax.config import Config
    from maverick_jax.convert import MANIFEST
    from maverick_jax.convert.formats.foreign import refuse_foreign
    from maverick_jax.errors import UserError

    if model in PRESETS:
        return getattr(Config, model)()
    if not os.path.exists(model):
        raise UserError(f"model {model!r} is neither {' nor '.join(PRESETS)} nor a directory, of which config.json alone is read.")
    if not (Path(model) / MANIFEST).is_file():  # else it is one of ours
        refuse_foreign(Path(model))
    return Config.from_directory(model)
