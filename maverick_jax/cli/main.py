"""`maverick COMMAND …`: finds the subcommand, and turns a user's mistakes into one line and exit status 2.

A subcommand is a module with a docstring (its help), `add_arguments(parser)` and `run(args) -> exit status`; it imports
jax only inside `run`, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys

from maverick_jax import __version__
from maverick_jax.cli import interrupt, status, streams
from maverick_jax.cli.parser import Parser, add_commands, refuse_unknown
from maverick_jax.errors import UserError, first_line

COMMANDS = {
    "demo": "convert the embedded mini model, ask it about two pictures on 8 devices",
    "convert": "PyTorch checkpoint (Hugging Face or Meta) -> model directory (Orbax)",
    "verify": "is a model directory whole, and what its checkpoint makes",
    "export": "model directory -> Hugging Face checkpoint",
    "inspect": "what is in a checkpoint: names, shapes, dtypes, bytes",
    "generate": "answer one prompt",
    "chat": "talk, with pictures",
    "serve": "answer clients over HTTP, as OpenAI's servers do",
    "batch": "answer a file of requests",
    "train": "post-training: adapters on all experts, or all weights",
    "tokens": "how many tokens a prompt has, and which",
    "plan": "will it fit, how fast can it be, on devices that need not be there",
    "check": "is this machine fit: versions, kernels against float64, speeds, links, what is missing",
    "bench": "how fast a model is served here, and what share of the machine that is",
    "completion": "the Tab key completes commands, options and files",
}
ON_THE_HOST = ("inspect", "export")  # Orbax starts jax's backend to read a checkpoint: no accelerator is taken from others for that
MISTAKE = 2
NO_MEMORY = "RESOURCE_EXHAUSTED"
CURE = "Ask for fewer --slots or a smaller --max-length; `maverick plan` says what fits; of a GPU XLA_CLIENT_MEM_FRACTION gives more."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line of this process, or `arguments` inside of somebody's. Returns the exit status."""
    ours = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    interrupt.hint("")
    try:
        streams.require_output()
        ended = _run(arguments, ours)
        sys.stdout.flush()  # the end of the process is too late to learn of a full disk
        return ended
    except UserError as error:
        if debug:
            raise
        return _mistake(str(error))
    except KeyboardInterrupt:
        if debug:
            raise
        return interrupt.end()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has had enough
        return 0
    except OSError as error:
        if debug:
            raise
        return _mistake(streams.reason(error))
    except RuntimeError as error:  # jax's, which is not imported for every command
        if debug or NO_MEMORY not in str(error):
            raise
        return _mistake(f"the devices have no memory left ({first_line(error)}). {CURE}")


def _run(arguments: list[str], ours: bool) -> int:
    if arguments[:1] in ([], ["help"]):  # `maverick`, `maverick help`, `maverick help COMMAND`
        arguments = [*arguments[1:], "--help"]
    if not arguments[0].startswith("-"):
        refuse_unknown(arguments[0], list(COMMANDS))
    try:
        parser = make_parser()
        args = parser.parse_args(arguments)
    except SystemExit as end:  # it has printed its help, or the version
        return int(end.code or 0)
    if "run" not in args:
        parser.error("a command is missing")
    if ours and arguments[0] in ON_THE_HOST:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if ours and not any(vars(args).get(name) for name in ("json", "quiet")):
        status.speak()
    return args.run(args)


def _mistake(text: str) -> int:
    print(f"maverick: {text}", file=sys.stderr)
    return MISTAKE


def make_parser() -> Parser:
    """The grammar of all commands."""
    parser = Parser(
        prog="maverick",
        description="Llama 4 (Maverick, Scout) in JAX.",
        epilog="maverick COMMAND --help, or maverick help COMMAND, says the rest, with examples.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"maverick-jax {__version__}")
    add_commands(parser.add_subparsers(metavar="COMMAND"), "maverick_jax.cli", COMMANDS, "run")
    return parser


def complete_words() -> None:
    """Where the shell asks what may come next: answer it, and end."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(make_parser(), always_complete_options="long")


if __name__ == "__main__":  # without what `python -m maverick_jax` does for a process of its own
    sys.exit(main())
