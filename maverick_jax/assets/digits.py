"""Questions about two handwritten digits: what the mini model was trained on, and its held-out pictures."""

from __future__ import annotations

from importlib import resources

import numpy as np
from PIL import Image

QUESTIONS = ("Which digit is left?", "Which digit is right?", "What is the sum?", "Which is larger?")
HELD_OUT = "held_out_digits.npz"


def answer(question: str, left: int, right: int) -> str:
    """What the mini model was taught to say."""
    if question == QUESTIONS[0]:
        return f"The left digit is {left}."
    if question == QUESTIONS[1]:
        return f"The right digit is {right}."
    if question == QUESTIONS[2]:
        return f"{left} + {right} = {left + right}."
    if left == right:
        return f"Both are {left}."
    return f"{max(left, right)} is larger than {min(left, right)}."


def picture(pixels: np.ndarray) -> Image.Image:
    """[8, 8] uint8 ink -> greyscale picture, white ink on black."""
    return Image.fromarray(pixels)


def messages(question: str, left: Image.Image, right: Image.Image) -> list[dict]:
    """The conversation that asks `question` about two pictures."""
    pictures = [{"type": "image", "image": image} for image in (left, right)]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """[N, 8, 8] uint8 pictures that the mini model has never seen, and their [N] labels."""
    with resources.files("maverick_jax.assets").joinpath(HELD_OUT).open("rb") as file, np.load(file) as arrays:
        return arrays["pictures"], arrays["labels"].astype(np.int32)


def held_out_examples(count: int, seed: int = 0) -> list[tuple[str, int, int, str]]:
    """`count` questions as (question, index of the left picture, of the right one, expected answer), kinds in turn."""
    labels = held_out()[1]
    pairs = np.random.default_rng(seed).integers(len(labels), size=(count, 2))
    return [
        (question, int(left), int(right), answer(question, int(labels[left]), int(labels[right])))
        for (left, right), question in zip(pairs, (QUESTIONS[i % len(QUESTIONS)] for i in range(count)), strict=True)
    ]


def draw(*pictures: np.ndarray) -> str:
    """Pictures of [8, 8] uint8 side by side as block characters."""
    shades = np.array(list(" ░▒▓█"))
    rows = np.concatenate([np.pad(p, ((0, 0), (0, 3))) for p in pictures], axis=1)
    return "\n".join("".join(np.repeat(shades[row.astype(int) * 5 // 256], 2)).rstrip() for row in rows)
