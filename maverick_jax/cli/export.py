"""Turn a model directory back into a Hugging Face checkpoint: safetensors shards, index and config, bit for bit what
was converted: all weights are held against the directory's digests as they are read. FP8 experts become the official
FP8 layout; --format bfloat16 multiplies any quantized weights out. --merge adds a LoRA, PEFT's or ours, to the weights.

examples:
  maverick export maverick Llama-4-Maverick-again
  maverick export maverick-int8 Llama-4-Maverick-from-int8 --format bfloat16
  maverick export maverick Llama-4-Maverick-tuned --merge adapter
"""

import argparse

from maverick_jax.cli import interrupt
from maverick_jax.cli.options import add_report_arguments, note_all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="model directory, from `maverick convert`")
    parser.add_argument("out", metavar="HF_DIR", help="Hugging Face directory to make")
    parser.add_argument("--format", metavar="F", help="bfloat16 or float32 (default: as stored)")
    parser.add_argument("--merge", metavar="DIR", help="directory of a LoRA for this model, or a Hub id: added to the weights")
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import json

    from maverick_jax.convert import export
    from maverick_jax.convert.build.model_source import note_unchecked

    interrupt.hint(f"{args.out}.partial is of no use: remove it, or run the same command again, which begins anew.")
    out = export(args.model, args.out, target=args.format, merge=args.merge, progress=not (args.quiet or args.json))
    note_all(note_unchecked(args.model))
    print(json.dumps({"out": str(out)}) if args.json else out)
    return 0
