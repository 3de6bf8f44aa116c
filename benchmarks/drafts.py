"""When drafts by prompt lookup pay: how many are accepted, and what a token costs with them and without.

The mini model's answers, each by an engine of its own: to text that repeats itself, to questions, and to random tokens. An engine with
drafts reads every step's tokens before it plans the next one; one without plans ahead. The best of several runs counts.

examples:
  python benchmarks/drafts.py
  python benchmarks/drafts.py --batch 1 --draft 4 --repeats 10
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import maverick_jax as mj
from maverick_jax.bench.loads import ask, random_prompts
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.request import Request

NEW = 48
REPEATED, QUESTION = "What is the sum? The sum is 7. ", "What is the sum?"


def prompts(model: mj.Llama4, kind: str, batch: int) -> list[Request]:
    assert model.directory is not None
    tokenizer = mj.Tokenizer.from_directory(model.directory)
    if kind == "random tokens":
        return [ask(ids, NEW) for ids in random_prompts(model.config, batch, 48, seed=0)]
    text = REPEATED * 4 + "What is" if kind == "a sentence four times" else QUESTION
    return [ask(np.array(tokenizer.encode(f"{i} {text}"), np.int32), NEW) for i in range(batch)]


def seconds_per_token(engine: Engine, requests: list[Request]) -> float:
    """Of decoding, for all rows together: the prompts are known after the first run."""
    began = time.perf_counter()
    handles = engine.run(requests)
    return (time.perf_counter() - began) / sum(handle.new_tokens for handle in handles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="requests at a time")
    parser.add_argument("--draft", type=int, nargs="+", default=[2, 4, 8], help="longest drafts")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the best counts")
    args = parser.parse_args()
    model = mj.load()
    print("| text | batch | longest draft | accepted | tokens per step with a draft | ms per token | without drafts |")
    print("|---|---|---|---|---|---|---|")
    for batch in args.batch:
        engines = {draft: Engine(model, slots=batch, max_length=256, draft=draft) for draft in (0, *args.draft)}
        for kind in ("a sentence four times", "a question", "random tokens"):
            requests, best = prompts(model, kind, batch), dict.fromkeys(engines, float("inf"))
            found = {}
            for run in range(args.repeats + 1):  # the first one compiles
                for draft, engine in engines.items():
                    before = (engine.drafted.steps, engine.drafted.proposed, engine.drafted.accepted)
                    took = seconds_per_token(engine, requests)
                    now = (engine.drafted.steps, engine.drafted.proposed, engine.drafted.accepted)
                    found[draft] = tuple(b - a for a, b in zip(before, now, strict=True))
                    best[draft] = min(best[draft], took) if run else float("inf")
            for draft in args.draft:
                steps, proposed, accepted = found[draft]
                share, per_step = accepted / max(proposed, 1), 1 + accepted / max(steps, 1)
                times = f"{1000 * best[draft]:.2f} | {1000 * best[0]:.2f}"
                print(f"| {kind} | {batch} | {draft} | {share:.0%} of {proposed} | {per_step:.2f} | {times} |", flush=True)


if __name__ == "__main__":
    main()
