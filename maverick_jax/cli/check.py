"""Is this machine fit for a model: the first thing to run on a new host, and the first thing to send with a report of a fault.
Versions and devices; the model's kernels, at the sizes that a device has of it, held against float64; bytes and products per second
that are reached; what all devices exchange; what is missing, and what to install. No checkpoint is needed. The status is 0 if all is
well, 1 if something computes or arrives wrong.

examples:
  maverick check
  maverick check -m scout --dtype int4
  maverick check --mesh expert=8 --dtype fp8
  maverick check -m ./maverick --mesh tensor=8 --layout latency
  maverick check --json | jq '.kernels[] | {name, error, seconds}'
"""

import argparse
import json

from maverick_jax.cli import options, plan, status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    plan.add_model_argument(parser)
    parser.add_argument("--mesh", metavar="AXES", help="such as data=1,expert=8,tensor=1 (default: all devices on expert)")
    parser.add_argument("--layout", default="throughput", metavar="NAME", help="throughput or latency (default: throughput)")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float32, or routed experts in fp8, int8 or int4 (default: bfloat16)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


@options.on_every_process
def run(args: argparse.Namespace) -> int:
    from maverick_jax.check import check
    from maverick_jax.sharding import get_layout, parse_mesh

    config = plan.model_config(args.model)
    with status.doing("checking"):
        axes = parse_mesh(args.mesh) if args.mesh is not None else options.default_mesh(config)
        report = check(config, axes, get_layout(args.layout), args.dtype, model=args.model)
    print(json.dumps(report.as_dict()) if args.json else report)
    return 0 if report.healthy else 1
