"""What the engine's scheduler did in a recorded run, by doing it again without a model.

    python benchmarks/replay_trace.py TRACE.jsonl

`maverick … --trace TRACE.jsonl` records one. Every plan must come out as it was, or the line is told where one does not. Prints what was
planned: steps, calls and how full they were, rows, pages, prompt tokens that were found in the cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from maverick_jax.errors import UserError
from maverick_jax.inference.scheduling.plans import Plan
from maverick_jax.inference.scheduling.scheduler import Scheduler
from maverick_jax.inference.scheduling.trace import replay


class Summary:
    """Counts over the plans of a run."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.most_rows = self.most_pages = 0
        self.begun: set[int] = set()

    def add(self, scheduler: Scheduler, plan: Plan) -> None:
        """One more step."""
        counts = self.counts
        counts["steps"] += 1
        counts["steps without a call"] += not plan.calls
        counts["copies"] += len(plan.copies)
        counts["preempted"] += len(plan.preempted)
        self.begun -= set(plan.preempted)
        for call in plan.calls:
            counts[f"{call.kind} calls"] += 1
            counts[f"{call.kind} tokens"] += sum(part.length for part in call.parts)
            counts[f"{call.kind} tokens, padded"] += call.rows * call.tokens
            counts["draws"] += sum(part.samples for part in call.parts)
            for part in call.parts:
                if part.row not in self.begun:
                    self.begun.add(part.row)
                    counts["rows begun"] += 1
                    counts["tokens found in the cache"] += part.start
        self.most_rows = max(self.most_rows, sum(len(call.parts) for call in plan.calls))
        self.most_pages = max(self.most_pages, scheduler.limits.pages - scheduler.available_pages)

    def lines(self) -> list[str]:
        """A name and a number each."""
        counts = self.counts | Counter({"rows in a step, at most": self.most_rows, "pages held, at most": self.most_pages})
        return [f"{name:<28}{count:>12,}" for name, count in counts.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Do again what the scheduler of a recorded run did, and say what that was.")
    parser.add_argument("trace", type=Path)
    args = parser.parse_args()
    summary, start = Summary(), time.perf_counter()
    try:
        with open(args.trace, encoding="utf-8") as lines:
            for scheduler, plan in replay(lines):
                summary.add(scheduler, plan)
    except (OSError, UnicodeDecodeError, UserError) as error:
        sys.exit(f"{args.trace}: {error}")
    print("\n".join(summary.lines()))
    print(f"the same plans as recorded; {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
