"""Will a model fit, and how fast can it be: memory per device and a roofline, for devices that need not be there. The
limits assume that every byte moves and every product is made at the chip's full rate; docs/planning.md has the formulas.

examples:
  maverick plan --topology v6e:8x8
  maverick plan --topology h100:8 --dtype fp8 --batch 64 --context 8192
  maverick plan --topology h100:8x2 --batch 128 --search
  maverick plan --model scout --topology v5p:2x2x2 --mesh expert=2,tensor=4 --layout latency
  maverick plan --topology v6e:8x8 --batch 256 --search
  maverick plan --topology v6e:8x8 --mesh expert=8,tensor=8 --compile
  maverick plan --topology h200:8 --dtype fp8 --json | jq .decode.tokens_per_second
"""

import argparse
import json
import os
import sys
from pathlib import Path

from maverick_jax.cli import options

PRESETS = ("maverick", "scout")


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", default="maverick", metavar="MODEL", help="maverick, scout, or a directory such as ./maverick (default: maverick)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--topology", required=True, help="TPU slice or GPUs, such as v6e:8x8, v5p:4x4x4, h100:8 or, two hosts, h100:8x2")
    parser.add_argument("--mesh", metavar="AXES", help="such as expert=8,tensor=8 (default: the fastest that fits)")
    parser.add_argument("--layout", help="throughput or latency (default: throughput; with --search: all)")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float32, or routed experts in fp8, int8 or int4 (default: bfloat16)")
    parser.add_argument("--batch", type=int, default=64, metavar="B", help="rows that decode together (default: 64)")
    parser.add_argument(
        "--context", type=int, metavar="T", help="tokens that each row has room for (default: 8192, or what the model takes)"
    )
    parser.add_argument("--search", action="store_true", help="compare the meshes that divide and fit, the best first")
    parser.add_argument("--compile", action="store_true", help="ask the real compiler about the decode step (extra tpu or cuda13; no chip)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE", help="draw memory per device and the limit over batch (of a search: of the best)")


def run(args: argparse.Namespace) -> int:
    options.quiet_accelerator_search()
    from maverick_jax.errors import UserError
    from maverick_jax.plan import make_plan, search
    from maverick_jax.plan.plot import check_plot, save_plot
    from maverick_jax.plan.report import search_table
    from maverick_jax.sharding import parse_mesh

    if args.search and args.mesh is not None:
        raise UserError("--search tries every mesh: leave out --mesh.")
    if args.plot is not None:
        check_plot(args.plot)
    if args.compile:
        _check_compiler(args.topology)
    config = model_config(args.model)
    question = {"topology": args.topology, "layout": args.layout, "dtype": args.dtype, "batch": args.batch, "context": args.context}
    if args.search:
        plans = search(config, **question)
    else:
        plans = [make_plan(config, mesh=parse_mesh(args.mesh) if args.mesh is not None else None, **question)]
    best = plans[0]
    if not best.fits:
        raise UserError(f"model {args.model} {best.refusal}")
    if args.plot is not None:
        save_plot(best, args.plot, model=args.model if args.model in PRESETS else Path(args.model).resolve().name)
    compiled = _compile(best) if args.compile else None
    if args.json:
        values = {"plans": [plan.as_dict() for plan in plans]} if args.search else best.as_dict()
        print(json.dumps(values | ({"compiled": compiled.as_dict()} if compiled else {})))
    else:
        print(search_table(plans) if args.search else best)
        if compiled:
            print(f"\n{compiled}")
    return 0


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
