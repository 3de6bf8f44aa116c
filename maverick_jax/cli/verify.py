"""Check a model directory: every digest that was noted when it was made. With --against, every tensor is also made
again from the checkpoint and compared, and, where PyTorch and transformers are installed and SRC is a Hugging Face
directory, hidden states and logits are compared with transformers' on a prompt with a picture, layer by layer. Exit
status 1 if something differs; each difference is a line on standard error.

examples:
  maverick verify maverick
  maverick verify maverick --against Llama-4-Maverick-17B-128E-Instruct
"""

import argparse

from maverick_jax.cli.options import add_report_arguments, quiet_accelerator_search

DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUT", help="model directory, from `maverick convert`")
    parser.add_argument("--against", metavar="SRC", help="the checkpoint that it was made from")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="threads (default: 4)")
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import dataclasses
    import json
    import sys

    from maverick_jax.convert.verify import verify

    quiet_accelerator_search()
    progress = not (args.quiet or args.json)
    report = verify(args.model, args.against, workers=args.workers, progress=progress)
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print(report.as_text())
    for problem in report.problems:
        print(f"maverick: {problem}", file=sys.stderr)
    return DIFFERENT if report.problems else 0
