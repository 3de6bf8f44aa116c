"""How hard prompts are, by how often a judge gets them right, and those that are kept.

OUT/scores.jsonl    a line per prompt: {"line": 7, "passes": 3, "answers": 8}
OUT/kept.jsonl      the lines of the file whose share of right answers is within the borders, as they were

Llama 4's supervised stage dropped more than half of the data, which earlier models as judges had tagged easy; its online stage kept to what
was neither always nor never answered (Meta's post of April 2025).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from maverick_jax.errors import UserError
from maverick_jax.training.rollouts.judges import Judge
from maverick_jax.training.rollouts.prompts import Prompt
from maverick_jax.training.rollouts.rewards import BadReward, Reward, worth

SCORES, KEPT = "scores.jsonl", "kept.jsonl"
AT_ONCE = 64  # prompts that are judged before their scores are written
BAD_IN_A_ROW = 3
PASSES = 1.0  # an answer that is worth as much is right


class Score(NamedTuple):
    """Of a line: how many answers were right, of how many."""

    line: int
    passes: int
    answers: int

    @property
    def rate(self) -> float:
        return self.passes / self.answers

    def pass_at(self, k: int) -> float:
        """How likely one of k answers is right, without bias. Source: Chen et al. 2021, equation 1, https://arxiv.org/abs/2107.03374."""
        return 1 - math.comb(self.answers - self.passes, k) / math.comb(self.answers, k)


def score(
    prompts: Sequence[Prompt],
    judge: Judge,
    reward: Reward,
    out: Path,
    *,
    count: int,
    max_new_tokens: int,
    seed: int = 0,
    told: Callable[[str], object],
    progress: bool = False,
) -> list[Score]:
    """A score for every prompt, written as they come; those that are there are not made again.

    Args:
      count: answers to a prompt.
      told: takes a sentence that people should read.

    Raises:
      UserError: the reward failed for three prompts in a row.
    """
    file = out / SCORES
    known = _read(file)
    missing = [prompt for prompt in prompts if prompt.number not in known]
    bad = 0
    with (
        file.open("a", encoding="utf-8") as stream,
        tqdm(
            total=len(prompts), initial=len(prompts) - len(missing), desc="judging", unit="prompt", disable=None if progress else True
        ) as bar,
    ):
        for at in range(0, len(missing), AT_ONCE):
            some = missing[at : at + AT_ONCE]
            for prompt, texts in zip(some, judge.answers(some, count, max_new_tokens, seed), strict=True):
                bar.update()
                try:
                    passes = sum(worth(reward, text, prompt.line) >= PASSES for text in texts)
                except BadReward as error:
                    bad += 1
                    if bad >= BAD_IN_A_ROW:
                        raise UserError(f"{prompt.name}: {error} ({bad} prompts in a row.)") from error
                    told(f"{prompt.name}: {error} It has no score, and is not kept.")
                    continue
                bad = 0
                known[prompt.number] = Score(prompt.number, passes, count)
                stream.write(json.dumps(known[prompt.number]._asdict()) + "\n")
            stream.flush()
    return [known[prompt.number] for prompt in prompts if prompt.number in known]


def keep(file: Path, scores: Sequence[Score], out: Path, *, lowest: float, highest: float) -> int:
    """Write the lines whose rate is from `lowest` to `highest`, as they were; how many there are."""
    chosen = {score.line for score in scores if lowest <= score.rate <= highest}
    beside = out / f"{KEPT}.new"
    with file.open("rb") as lines, beside.open("wb") as kept:
        for number, line in enumerate(lines, 1):
            if number in chosen:
                kept.write(line if line.endswith(b"\n") else line + b"\n")
    beside.replace(out / KEPT)
    return len(chosen)


def histogram(scores: Sequence[Score], width: int = 50) -> str:
    """How many prompts were answered right so often, as bars."""
    counts: dict[int, int] = dict.fromkeys(range(max(score.answers for score in scores) + 1), 0)
    for found in scores:
        counts[found.passes] += 1
    most = max(counts.values())
    digits = len(f"{most:,}")
    return "\n".join(
        f"{passes:3d} of {max(counts)} right  {number:{digits},d} {'█' * math.ceil(width * number / most)}".rstrip()
        for passes, number in counts.items()
    )


def _read(file: Path) -> dict[int, Score]:
    """By line; what a killed run left of a last line is cut off."""
    if not file.is_file():
        return {}
    whole = file.read_bytes()
    if not whole.endswith(b"\n"):
        whole = whole[: whole.rfind(b"\n") + 1]
        file.write_bytes(whole)
    found: list[Mapping[str, Any]] = [json.loads(line) for line in whole.splitlines()]
    return {line["line"]: Score(**line) for line in found}
