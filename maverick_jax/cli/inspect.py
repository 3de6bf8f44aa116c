"""Print what is in a checkpoint, without reading the weights: parameter, shape, dtype, bytes, and the totals.

examples:
  maverick inspect Llama-4-Maverick-17B-128E-Instruct
  maverick inspect maverick --json | jq .parameters
"""

import argparse
import json

from maverick_jax.cli.options import note_all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", nargs="?", help="model directory or PyTorch checkpoint (default: the mini model)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from maverick_jax.checkpoint import resolve
    from maverick_jax.convert import inspect

    found = inspect(resolve(args.directory))
    note_all(found.notes)
    print(json.dumps(found.as_dict()) if args.json else found.as_table())
    return 0
