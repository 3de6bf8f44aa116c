"""Post-training: a model learns from conversations. Each kind of training is a command of its own, with its own --help.

A run writes to its own directory: checkpoints, metrics.jsonl, curves for TensorBoard, and at the end what was learned. Interrupted,
killed even, it goes on when the same command is run again.

examples:
  maverick train sft conversations.jsonl run
  maverick train sft -m maverick --mesh expert=8 conversations.jsonl run
"""

import argparse
import importlib

KINDS = {
    "sft": "learn the assistant's answers in a file of conversations",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(metavar="KIND")
    for name, summary in KINDS.items():
        module = importlib.import_module(f"maverick_jax.cli.train.{name}")
        sub = kinds.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(kind=module.run)


def run(args: argparse.Namespace) -> int:
    from maverick_jax.errors import UserError

    if "kind" not in args:
        raise UserError(f"a kind of training is missing: choose one of {', '.join(KINDS)} (maverick train --help).")
    return args.kind(args)
