"""How many tokens a prompt has, which they are, and who wrote each: the chat template, the text that was given, or a picture.
Reads config, tokenizer and template; the weights may be missing.

examples:
  maverick tokens "Which digit is left?"
  maverick tokens "What is the sum?" --image demo/left.png --image demo/right.png
  maverick tokens -m maverick --system "Be brief." - < question.txt
  maverick tokens --json "Which digit is left?" | jq .total
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from maverick_jax.cli import streams
from maverick_jax.cli.parser import given_words, words
from maverick_jax.cli.terminal.answers import harmless

if TYPE_CHECKING:
    from maverick_jax.prompt.listing import Token

LONGEST_RUN = 2  # of one token; more are a line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", type=words, metavar="PROMPT", help="the question; - reads it from standard input")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    parser.add_argument("--system", type=given_words, metavar="TEXT", help="system message")
    parser.add_argument("--raw", action="store_true", help="the text as it is, without the chat format (base models)")
    parser.add_argument("-m", "--model", metavar="DIR", help="model directory, PyTorch checkpoint or Hub id (default: the mini model)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from maverick_jax.checkpoint import resolve
    from maverick_jax.config import Config
    from maverick_jax.errors import UserError
    from maverick_jax.prompt import Tokenizer

    text = streams.read_input() if args.prompt == "-" else args.prompt
    if not text.strip():
        raise UserError("the prompt is empty: ask something.")
    if args.raw and (args.image or args.system):
        raise UserError("--raw is plain text: --image and --system need the chat format.")
    directory = resolve(args.model, weights=False)
    config, tokenizer = Config.from_directory(directory), Tokenizer.from_directory(directory)
    tokens = _listed(text, args, directory, config, tokenizer)
    context = config.text.max_position_embeddings
    if args.json:
        print(json.dumps({"total": len(tokens), "context": context, "tokens": [_as_dict(token) for token in tokens]}, ensure_ascii=False))
        return 0
    print(f"{'':>7}{'id':>9}  {'from':<15}token")
    for line in _lines(tokens):
        print(line)
    print(_total(tokens, context))
    return 0


def _listed(text, args, directory, config, tokenizer) -> list[Token]:
    from maverick_jax.prompt import load_template, user_message
    from maverick_jax.prompt.chat import compose
    from maverick_jax.prompt.listing import TEMPLATE, Token, list_tokens
    from maverick_jax.prompt.provenance import Text

    if args.raw:
        begin = config.bos_token_id
        return [Token(begin, tokenizer.spelling(begin), True, TEMPLATE), *list_tokens([Text(text)], [], tokenizer, config)]
    system = [{"role": "system", "content": args.system}] if args.system else []
    pieces, images = compose([*system, user_message(text, args.image)], tokenizer, template=load_template(directory))
    return list_tokens(pieces, images, tokenizer, config)


def _lines(tokens: list[Token]) -> Iterator[str]:
    """A line for every token, or for a run of the same one, as the `<|patch|>`s of a picture's tile are."""
    at = 0
    for token, run in itertools.groupby(tokens):
        count = len(list(run))
        shown = [count] if count > LONGEST_RUN else [1] * count
        for number in shown:
            times = f" x {number:,}" if number > 1 else ""
            yield f"{at:>7,}{token.id:>9}  {token.source:<15}{_written(token)}{times}"
            at += number


def _written(token: Token) -> str:
    """Control tokens by their names; text in quotes, so that spaces are seen; a part of a character as its bytes."""
    try:
        text = token.spelling.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in token.spelling)
    return text if token.special else harmless(json.dumps(text, ensure_ascii=False))


def _total(tokens: list[Token], context: int) -> str:
    """How many, of which kind, and how much of the context that is."""
    sources = collections.Counter(token.source.rstrip(" 0123456789") for token in tokens)  # all pictures together
    parts = ", ".join(f"{count:,} {name}" for name, count in sources.items())
    total = f"{len(tokens):,} tokens ({parts}): {len(tokens) / context:.1%} of the context of {context:,}"
    return total if len(tokens) <= context else f"{total}, which is too long"


def _as_dict(token: Token) -> dict[str, object]:
    text = token.spelling.decode(errors="backslashreplace")
    return {"id": token.id, "text": text, "special": token.special, "from": token.source}
