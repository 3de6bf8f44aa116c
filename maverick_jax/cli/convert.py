"""Turn a Hugging Face checkpoint (config.json, *.safetensors) into a model directory: an Orbax checkpoint under params/
beside config.json and the tokenizer. Memory stays small whatever the model's size. Run it again after an interruption
and it goes on where it was.

examples:
  maverick convert Llama-4-Maverick-17B-128E-Instruct maverick
  maverick generate -m maverick "What is the capital of France?"
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="Hugging Face directory")
    parser.add_argument("out", metavar="OUT", help="model directory to make")


def run(args: argparse.Namespace) -> int:
    from maverick_jax.convert import convert

    convert(args.source, args.out)
    print(args.out)
    return 0
