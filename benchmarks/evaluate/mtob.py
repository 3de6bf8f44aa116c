"""MTOB: translating a language that is known from one grammar book, in a context of 100,000 tokens and more.

    git clone https://github.com/lukemelas/mtob
    (cd mtob && unzip -P kalamang dataset-encrypted-with-password-kalamang.zip)
    inspect eval benchmarks/evaluate/mtob.py --model openai-api/maverick/NAME --temperature 0 -T folder=mtob -T direction=ek -T book=half

`direction`: ek from English to Kalamang, ke back; `book`: half of it or the long one, as the data has them for models of such contexts. The
question stands behind the book, its word list and its sentences, so that the prefix cache reads them once. Score: chrF of sacrebleu.

Source: Tanzer et al., "A Benchmark for Learning to Translate a New Language from One Grammar Book", 2023.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import sacrebleu
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Score, Target, mean, scorer
from inspect_ai.solver import TaskState, generate

BOOKS = {"half": "grammar_book_for_claude_medium.txt", "full": "grammar_book_for_claude_long.txt"}
NAMES = {"ek": ("English", "Kalamang"), "ke": ("Kalamang", "English")}


@scorer(metrics=[mean()])
def chrf():
    async def score(state: TaskState, target: Target) -> Score:
        said = state.output.completion.strip().partition("\n")[0]
        return Score(value=sacrebleu.sentence_chrf(said, [target.text]).score, answer=said)

    return score


def rows(path: Path) -> list[dict]:
    """Of a split, whose first entry is a canary."""
    return [row for row in json.loads(path.read_text(encoding="utf-8")) if "original" in row]


@task
def mtob(folder: str, direction: Literal["ek", "ke"] = "ek", book: Literal["half", "full"] = "half") -> Task:
    source, target = NAMES[direction]
    resources, splits = Path(folder, "resources"), Path(folder, "splits")
    words = json.loads((resources / "wordlist.json").read_text(encoding="utf-8"))[direction]
    grammar = (resources / BOOKS[book]).read_text(encoding="utf-8")
    meanings = [f"{word}: {', '.join(map(str, meant)) if isinstance(meant, list) else meant}" for word, meant in words.items()]
    sentences = [f"{row['original']} = {row['translation']}" for row in rows(splits / "train_examples.json")]
    known = "\n".join(["# A grammar of Kalamang", grammar, "# Words", *meanings, "# Sentences", *sentences])
    asked = f"\n\nTranslate this from {source} to {target}. Answer with the translation alone, in one line.\n\n"
    samples = [
        Sample(input=known + asked + row["original"], target=row["ground_truth"])
        for row in rows(splits / f"test_examples_{direction}.json")
    ]
    return Task(dataset=MemoryDataset(samples, name=f"mtob {direction} {book}"), solver=generate(), scorer=chrf())
