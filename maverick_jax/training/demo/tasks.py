"""Questions about numbers and bars on pictures that are drawn here: as many as one likes, each with its right answer.

Two- and three-digit numbers are read, compared and added, of bars the longest is found and heights are told. Pictures have any
proportions, so that they are cut into 2 to 6 tiles, and figures lie where they fall: across borders of tiles too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maverick_jax.prompt import tile_image
from maverick_jax.training.data.conversations import Conversation
from maverick_jax.training.data.examples import Example, Reading
from maverick_jax.training.rollouts.prompts import Prompt, prompt_of

CELL = 32  # pixels that a digit has at most, which is the side of the mini model's tiles
LEAST = 0.85  # of it: how small its cell may be
SIZES = (24, 34)  # of the letters, in pixels
NOISE = (0, 50)  # grey levels: standard deviation of what is added to a picture
INK = (150, 255)
BARS = (2, 4)
HIGHEST = 9  # units of a bar
ORDINALS = ("first", "second", "third", "fourth")


class Question(NamedTuple):
    """One question, of a kind, and its right answer.

    Attributes:
      task: of `TASKS`.
      picture: greyscale, light on dark.
    """

    task: str
    picture: Image.Image
    text: str
    answer: str


def read(random: np.random.Generator) -> Question:
    digits = int(random.integers(2, 4))
    number = int(random.integers(10 ** (digits - 1), 10**digits))
    return Question("read", written(random, [number], digits), "Which number?", f"{number}.")


def compare(random: np.random.Generator) -> Question:
    upper, lower = random.choice(np.arange(10, 100), 2, replace=False)
    answer = f"{max(upper, lower)} is larger than {min(upper, lower)}."
    return Question("compare", written(random, [upper, lower], 2), "Which is larger?", answer)


def add(random: np.random.Generator) -> Question:
    upper, lower = int(random.integers(10, 100)), int(random.integers(1, 10))
    return Question("add", written(random, [upper, lower], 2), "What is the sum?", f"{upper} + {lower} = {upper + lower}.")


def longest(random: np.random.Generator) -> Question:
    heights = random.choice(np.arange(1, HIGHEST + 1), int(random.integers(BARS[0], BARS[1] + 1)), replace=False).tolist()
    return Question("longest", bars(random, heights), "Which bar is longest?", f"The {ORDINALS[heights.index(max(heights))]}.")


def height(random: np.random.Generator) -> Question:
    heights = random.integers(1, HIGHEST + 1, int(random.integers(BARS[0], BARS[1] + 1))).tolist()
    asked = int(random.integers(len(heights)))
    return Question("height", bars(random, heights), f"How high is bar {asked + 1}?", f"{heights[asked]}.")


TASKS: dict[str, Callable[[np.random.Generator], Question]] = {
    "read": read,
    "compare": compare,
    "add": add,
    "longest": longest,
    "height": height,
}


def questions(count: int, seed: int | Sequence[int]) -> list[Question]:
    """`count` questions, tasks in turn. Each follows from the seed and its number alone."""
    tasks = [*TASKS.values()]
    return [tasks[n % len(tasks)](np.random.default_rng((*np.atleast_1d(seed).tolist(), n))) for n in range(count)]


def prompts(asked: Sequence[Question], reading: Reading) -> list[Prompt]:
    """What the model is asked, with the right answers beside it."""
    return [prompt_of(conversation, reading, Path("questions")) for conversation in conversations(asked, reading)]


def examples(asked: Sequence[Question], reading: Reading) -> list[Example]:
    """Questions with their right answers, to be learned."""
    return [reading.example(conversation) for conversation in conversations(asked, reading)]


def conversations(asked: Sequence[Question], reading: Reading) -> Iterator[Conversation]:
    """Their pictures are cut into tiles once and for all."""
    vision = reading.config.vision
    assert vision is not None
    for number, question in enumerate(asked):
        content = [{"type": "image", "image": tile_image(question.picture, vision)}, {"type": "text", "text": question.text}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}]
        yield Conversation(number, messages, None, {})


def written(random: np.random.Generator, numbers: Sequence[int], digits: int) -> Image.Image:
    """Numbers one above the other, flush right, every digit somewhere in a cell of its own."""
    wide, high = (CELL * random.uniform(LEAST, 1) for _ in range(2))
    picture = Image.new("L", (round(wide * digits), round(high * len(numbers))))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(random.uniform(*SIZES))
    ink = int(random.integers(*INK))
    for row, number in enumerate(numbers):
        for column, digit in enumerate(f"{number:{digits}d}"):
            left, top, right, bottom = draw.textbbox((0, 0), digit, font=font)
            x = column * wide + random.uniform(0, max(0, wide - (right - left))) - left
            y = row * high + random.uniform(0, max(0, high - (bottom - top))) - top
            draw.text((x, y), digit, fill=ink, font=font)
    return grainy(random, picture)


def bars(random: np.random.Generator, heights: Sequence[int]) -> Image.Image:
    """Bars that stand side by side; the highest that there can be is a unit lower than the picture."""
    width, tall = (round(CELL * random.uniform(1, 2)) for _ in range(2))
    picture = Image.new("L", (width, tall))
    draw = ImageDraw.Draw(picture)
    place = width / len(heights)
    thick = place * random.uniform(0.4, 0.7)
    ink = int(random.integers(*INK))
    for at, units in enumerate(heights):
        middle, top = (at + 0.5) * place, tall - tall * units / (HIGHEST + 1)
        draw.rectangle((round(middle - thick / 2), round(top), round(middle + thick / 2), tall), fill=ink)
    return grainy(random, picture)


def grainy(random: np.random.Generator, picture: Image.Image) -> Image.Image:
    """With noise, from none to what makes figures hard to read."""
    pixels = np.asarray(picture, np.float32)
    noise = random.normal(0, random.uniform(*NOISE), pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
