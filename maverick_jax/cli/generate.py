"""Answer one prompt, streamed. To a terminal control characters of the answer are written out (\\x1b); a file or a pipe gets it as
it is.

examples:
  maverick generate "Which digit is left?" --image demo/left.png --image demo/right.png
  maverick generate -m maverick --mesh expert=8 --image dog.jpg "What is in this picture?"
  maverick generate -m maverick --temperature 0.6 --top-p 0.9 --json "Write a haiku about rain."
  maverick generate -m maverick-base --raw "The capital of France is"
"""

import argparse

from maverick_jax.cli import compilation, options, streams
from maverick_jax.cli.parser import words
from maverick_jax.cli.terminal.answers import receive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", type=words, metavar="PROMPT", help="the question; - reads it from standard input")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat format (base models)")
    options.add_model_arguments(parser)
    options.add_adapter_argument(parser)
    options.add_sampling_arguments(parser)
    compilation.add_argument(parser)


@options.on_every_process
@compilation.programs_kept
def run(args: argparse.Namespace) -> int:
    from maverick_jax.errors import UserError
    from maverick_jax.inference.chat import Chat
    from maverick_jax.prompt import load_picture
    from maverick_jax.sharding import multihost

    text = args.prompt
    if text == "-":
        text = multihost.exchange(streams.read_input() if multihost.is_first() else None)[0]
    if not text.strip():
        raise UserError("the prompt is empty: ask something.")
    if args.raw and (args.image or args.system):
        raise UserError("--raw continues plain text: --image and --system need the chat format.")
    images = [load_picture(image) for image in args.image]  # a bad picture is reported before a large model is loaded
    seen = options.digest(b"".join(image.tobytes() for image in images))
    chat = Chat(options.load_model(args, pictures=seen), **options.chat_options(args))
    portions = chat.complete(chat.raw_prompt(text)) if args.raw else chat.stream(text, images)
    answer = receive(portions, show=not args.json)
    assert chat.last is not None
    if args.json:
        print(options.as_json(answer, chat.last))
    else:
        options.note(options.speed(chat.last))
    return 0
