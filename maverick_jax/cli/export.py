"""Turn a model directory back into a Hugging Face checkpoint: safetensors shards, index and config, bit for bit what
was converted.

example:
  maverick export maverick Llama-4-Maverick-again
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="model directory, from `maverick convert`")
    parser.add_argument("out", metavar="HF_DIR", help="Hugging Face directory to make")


def run(args: argparse.Namespace) -> int:
    from maverick_jax.convert import export

    export(args.model, args.out)
    print(args.out)
    return 0
