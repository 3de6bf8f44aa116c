"""How often the mini model answers right about pictures it has never seen."""

from __future__ import annotations

import numpy as np

from maverick_jax.assets import digits
from maverick_jax.inference.generate import generate
from maverick_jax.model import Llama4
from maverick_jax.prompt import Tokenizer, render

BATCH = 128


def answers(model: Llama4, tokenizer: Tokenizer, examples: list[tuple[str, int, int, str]]) -> list[str]:
    """The model's greedy answers to examples of `digits.held_out_examples`."""
    pictures = [digits.picture(pixels) for pixels in digits.held_out()[0]]
    prompts = [
        render(digits.messages(question, pictures[left], pictures[right]), tokenizer, model.config) for question, left, right, _ in examples
    ]
    texts = []
    for start in range(0, len(prompts), BATCH):
        group = prompts[start : start + BATCH]
        tiles = np.concatenate([prompt.tiles for prompt in group if prompt.tiles is not None])
        rows = generate(model, [prompt.token_ids for prompt in group], tiles=tiles, max_new_tokens=16)
        texts += [tokenizer.decode(row) for row in rows]
    return texts


def accuracy(model: Llama4, tokenizer: Tokenizer, count: int = 512) -> dict[str, float]:
    """Fraction of right answers to `count` held-out questions: of each kind, and of `all`."""
    examples = digits.held_out_examples(count)
    right = np.array([text == expected for text, (*_, expected) in zip(answers(model, tokenizer, examples), examples, strict=True)])
    kinds = np.array([question for question, *_ in examples])
    return {question: float(right[kinds == question].mean()) for question in digits.QUESTIONS} | {"all": float(right.mean())}
