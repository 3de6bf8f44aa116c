"""What holding an answer to a form costs on the host: compiling it, its masks, following a token; and drafts by prompt lookup.

Needs the extra `grammar` and a tokenizer of the releases (`tokenizer.json` or `tokenizer.model`). Each answer is followed token by
token, as the tokenizer writes it; the batch is of one form, every row a few tokens further than the one before.

examples:
  python benchmarks/grammar_masks.py ~/Llama-4-Maverick
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from maverick_jax.inference.grammar import Grammar, Grammars
from maverick_jax.inference.speculate import PromptLookup
from maverick_jax.prompt import Tokenizer

BATCHES = (1, 8, 64)
LONG = "The quick brown fox jumps over the lazy dog, é 😀. " * 3
FIELDS = {
    "text": {"type": "string", "maxLength": 200},
    "number": {"type": "number"},
    "times": {"type": "array", "items": {"type": "string", "format": "date-time"}},
}
PROPERTIES = {f"{name}{i}": FIELDS[name] for i in range(7) for name in FIELDS}
VALUE = {name: {"text": LONG, "number": -12.5, "times": ["2026-01-01T00:00:00Z"] * 3}[name.rstrip("0123456789")] for name in PROPERTIES}
FORMS = {
    "schema of 21 properties": (
        Grammar(json_schema={"type": "object", "properties": PROPERTIES, "required": [*PROPERTIES], "additionalProperties": False}),
        json.dumps(VALUE, indent=1, ensure_ascii=False),
    ),
    "any object": (Grammar(json_object=True), json.dumps(VALUE, ensure_ascii=False)),
    "any text up to 100,000": (Grammar(regex="(?s:.{1,100000})"), LONG * 3),
    "choice of 10,000": (Grammar(choice=[f"answer {i}" for i in range(10_000)]), "answer 1234"),
}


def timed(work: Callable[[], object]) -> float:
    """Microseconds."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of the tokenizer")
    tokenizer = Tokenizer.from_directory(parser.parse_args().directory)
    vocabulary = max(tokenizer.special.values()) + 1
    grammars = Grammars(tokenizer, vocabulary=vocabulary, end_ids=[tokenizer.id_of("<|eot|>")])
    print(f"vocabulary {vocabulary:,}; the tokenizer's tables, once: {timed(lambda: grammars.matcher(Grammar(regex='a'))) / 1e6:.2f} s\n")
    print(
        "| form | compiled, ms | tokens | mask, µs: median | 99 % | most | token followed, µs |", "|---|---|---|---|---|---|---|", sep="\n"
    )
    masks_1W = np.empty((1, grammars.words), np.uint32)
    for name, (grammar, answer) in FORMS.items():
        compiled = timed(lambda grammar=grammar: grammars.matcher(grammar))
        matcher, masks, followed = grammars.matcher(grammar), [], []
        for id in tokenizer.encode(answer):
            masks.append(timed(lambda matcher=matcher: grammars.fill([(matcher, 0, ())], masks_1W)))
            followed.append(timed(lambda matcher=matcher, id=id: matcher.accept(id)))
        figures = f"{np.median(masks):.0f} | {np.quantile(masks, 0.99):.0f} | {np.max(masks):.0f} | {np.median(followed):.1f}"
        print(f"| {name} | {compiled / 1000:.1f} | {len(masks)} | {figures} |")
    print("\n| rows | masks of all rows, µs |", "|---|---|", sep="\n")
    grammar, answer = FORMS["schema of 21 properties"]
    ids = tokenizer.encode(answer)
    for rows in BATCHES:
        matchers = [grammars.matcher(grammar) for _ in range(rows)]
        for i, matcher in enumerate(matchers):
            for id in ids[: 5 * i]:
                matcher.accept(id)
        masks_NW, batch = np.empty((rows, grammars.words), np.uint32), [(matcher, i, ()) for i, matcher in enumerate(matchers)]
        print(f"| {rows} | {np.median([timed(lambda b=batch, m=masks_NW: grammars.fill(b, m)) for _ in range(20)]):.0f} |")
    prompt = np.random.default_rng(0).integers(0, 1000, 8192).tolist()
    made = timed(lambda: PromptLookup(prompt))
    lookup = PromptLookup(prompt)
    step = timed(lambda: [(lookup.extend([id]), lookup.propose(4)) for id in prompt])
    print(f"\nprompt lookup: {made / 1000:.1f} ms for a prompt of 8,192 tokens, then {step / len(prompt):.1f} µs per token")


if __name__ == "__main__":
    main()
