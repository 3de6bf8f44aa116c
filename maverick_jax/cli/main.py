"""`maverick COMMAND …`: finds the subcommand, and turns a user's mistakes into one line and exit status 2.

A subcommand is a module with a docstring (its help), `add_arguments(parser)` and `run(args) -> exit status`; it imports
jax only inside `run`, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from maverick_jax import __version__
from maverick_jax.cli import interrupt

COMMANDS = {
    "demo": "convert the embedded mini model, ask it about two pictures on 8 devices",
    "convert": "PyTorch checkpoint (Hugging Face or Meta) -> model directory (Orbax)",
    "verify": "is a model directory whole, and what its checkpoint makes",
    "export": "model directory -> Hugging Face checkpoint",
    "inspect": "what is in a checkpoint: names, shapes, dtypes, bytes",
    "generate": "answer one prompt",
    "chat": "talk, with pictures",
    "tokens": "how many tokens a prompt has, and which",
    "plan": "will it fit, how fast can it be, on devices that need not be there",
}
MISTAKE = 2


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    args = _parser().parse_args(arguments)
    from maverick_jax.errors import UserError

    try:
        return args.run(args)
    except UserError as error:
        if args.debug:
            raise
        print(f"maverick: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        if args.debug:
            raise
        return interrupt.end()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="maverick", description="Llama 4 (Maverick, Scout) in JAX.")
    parser.add_argument("--version", action="version", version=f"maverick-jax {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"maverick_jax.cli.{name}")
        sub = commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=module.run)
    return parser
