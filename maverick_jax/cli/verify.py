"""Check a model directory: every digest that was noted when it was made. With --against, every tensor is also made
again from the checkpoint and compared, and, where PyTorch and transformers are installed and SRC is a Hugging Face
directory, hidden states and logits are compared with transformers' on a prompt with a picture, layer by layer. Exit
status 1 if something differs; each difference is a line on standard error.

examples:
  maverick verify maverick
  maverick verify maverick --against Llama-4-Maverick-17B-128E-Instruct
"""

import argparse

from maverick_jax.cli import compilation
from maverick_jax.cli.options import add_report_arguments, note, note_all, quiet_accelerator_search
from maverick_jax.cli.parser import positive

DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUT", help="model directory, from `maverick convert`")
    parser.add_argument("--against", metavar="SRC", help="the checkpoint that it was made from")
    parser.add_argument("--workers", type=positive, metavar="N", help="threads (default: 4, or the number of cores)")
    add_report_arguments(parser)
    compilation.add_argument(parser)


def run(args: argparse.Namespace) -> int:
    import dataclasses
    import json
    import sys

    from maverick_jax.convert.proof.verify import verify

    quiet_accelerator_search()
    progress = not (args.quiet or args.json)
    report = verify(args.model, args.against, workers=args.workers, progress=progress)
    note_all(report.notes)
    problems = list(report.problems)
    if not args.json:
        print(report.as_text(), flush=True)
    with compilation.kept(args.compilation_cache):
        comparison = _compare(args.model, args.against, progress) if args.against and not problems else None
    if comparison and not comparison.agrees and report.exact:
        problems.append(f"{comparison.worst.stage} differs from transformers' by {comparison.worst.relative:.1e} of its size.")
    if args.json:
        forward = comparison and comparison.as_dict()
        print(json.dumps(dataclasses.asdict(report) | {"problems": problems, "against_transformers": forward}))
    elif comparison:
        print(f"\n{comparison.as_table()}")
    for problem in problems:
        print(f"maverick: {problem}", file=sys.stderr)
    return DIFFERENT if problems else 0


def _compare(model: str, source: str, progress: bool):
    """Hidden states and logits beside transformers', where that can be done; else a note why not."""
    import importlib.util
    import pathlib

    if not any(pathlib.Path(source).glob("*.safetensors")):
        note(f"not compared with transformers: {source} has no safetensors files.")
        return None
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        note("not compared with transformers: pip install 'maverick-jax[torch]' transformers")
        return None
    from maverick_jax.convert.proof.compare import compare
    from maverick_jax.errors import UserError

    try:
        return compare(model, source, progress=progress)
    except UserError as error:
        note(f"not compared with transformers: {error}")
        return None
