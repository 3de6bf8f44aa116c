"""Turn a PyTorch checkpoint into a model directory: an Orbax checkpoint under params/ beside config.json and the
tokenizer. What SRC is, is recognised: Hugging Face (bfloat16 or the official FP8) or Meta's .pth files (bfloat16 or
FP8, any number of ranks). Memory stays below 1 GB whatever the model's size. Run it again after an interruption and it
goes on where it was: what was written is checked, the rest is done. SRC may also be a model directory: --format makes
another one of it, without the checkpoint that it came from.

examples:
  maverick convert Llama-4-Maverick-17B-128E-Instruct maverick
  maverick convert Llama-4-Maverick-17B-128E-Instruct maverick-int8 --format int8
  maverick convert Llama-4-Scout-17B-16E-Original scout --format int4 --quantize experts,shared
  maverick convert Llama-4-Maverick-17B-128E-Instruct-FP8 maverick --dry-run
  maverick convert maverick maverick-int4 --format int4
"""

import argparse

from maverick_jax.cli import interrupt
from maverick_jax.cli.options import add_report_arguments, note, note_all, on_every_process
from maverick_jax.cli.parser import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="Hugging Face directory or Hub id, Meta's directory, or model directory")
    parser.add_argument("out", metavar="OUT", help="model directory to make")
    parser.add_argument("--format", metavar="F", help="bfloat16, float32, fp8, int8 or int4 (default: as stored, FP8 bit for bit)")
    parser.add_argument("--quantize", metavar="W,…", help="what to quantize: experts, shared, dense, attention (default: experts)")
    parser.add_argument("--workers", type=positive, metavar="N", help="threads (default: 4, or the number of cores)")
    parser.add_argument("--no-digests", action="store_true", help="quicker; `verify` needs SRC then, and resuming looks at sizes only")
    parser.add_argument("--dry-run", action="store_true", help="say what would be read and written, free space and time; write nothing")
    add_report_arguments(parser)


@on_every_process
def run(args: argparse.Namespace) -> int:
    import dataclasses
    import json

    from maverick_jax.convert import convert
    from maverick_jax.convert.build.estimate import estimate

    options = {"target": args.format, "quantize": args.quantize}
    if args.dry_run:
        found = estimate(args.source, args.out, **options)
        note_all(found.notes)
        print(json.dumps(found.as_dict()) if args.json else found.as_text())
        return 0
    interrupt.hint("What is written stays: run the same command again to go on.")
    progress = not (args.quiet or args.json)
    summary = convert(args.source, args.out, **options, workers=args.workers, digests=not args.no_digests, progress=progress)
    note_all(summary.notes)
    for name in summary.not_finite:
        note(f"maverick: warning: {name} has values that are NaN or infinite, in the checkpoint or after the change of format.")
    if progress:
        note(summary.as_text())
    print(json.dumps(dataclasses.asdict(summary)) if args.json else summary.out)
    return 0
