"""Post-training: a model learns from conversations. Each kind of training is a command of its own, with its own --help.

A run writes to its own directory: checkpoints, metrics.jsonl, curves for TensorBoard, and at the end what was learned. Interrupted,
killed even, it goes on when the same command is run again.

examples:
  maverick train sft conversations.jsonl run
  maverick train sft -m maverick --mesh expert=8 conversations.jsonl run
"""

import argparse
import importlib.util

from maverick_jax.cli.parser import add_commands

EXTRA = ("grain", "tensorboardX")  # what the extra `train` brings
KINDS = {
    "sft": "learn the assistant's answers in a file of conversations",
    "filter": "keep what is hard in a file of conversations",
    "dpo": "learn which of two answers is preferred",
    "rl": "learn from its own answers by what they are worth",
    "distill": "learn what a larger model says of every token",
    "demo": "all of it on the mini model, each stage beside a control",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_commands(parser.add_subparsers(metavar="KIND"), "maverick_jax.cli.train", KINDS, "kind")


def run(args: argparse.Namespace) -> int:
    from maverick_jax.errors import UserError

    if "kind" not in args:
        raise UserError(f"a kind of training is missing: choose one of {', '.join(KINDS)} (maverick train --help).")
    missing = [package for package in EXTRA if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"training takes the extra `train` (missing: {', '.join(missing)}): pip install 'maverick-jax[train]'.")
    return args.kind(args)
