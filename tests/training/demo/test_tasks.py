"""Questions of the demo: right answers by construction, on pictures of any proportions."""

import re

import numpy as np
import pytest

from maverick_jax.assets import mini_directory
from maverick_jax.config import Config
from maverick_jax.prompt import tile_image
from maverick_jax.training.data.files import reading_of
from maverick_jax.training.demo import tasks


@pytest.fixture(scope="module")
def questions():
    return tasks.questions(300, 5)


def of(questions, task):
    found = [question for question in questions if question.task == task]
    assert len(found) == 60
    return found


def test_a_seed_decides(questions):
    """And each question's number alone, however many there are; another seed asks others."""
    again = tasks.questions(20, 5)
    assert [question[2:] for question in again] == [question[2:] for question in questions[:20]]
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(again, questions, strict=False))
    assert [question[2:] for question in tasks.questions(20, (5, 1))] != [question[2:] for question in again]


def test_pictures_of_any_proportions_have_several_tiles(questions):
    """Wide and tall ones; the mini model's tiles have 32 pixels."""
    vision = Config.from_directory(mini_directory()).vision
    ratios = [question.picture.width / question.picture.height for question in questions]
    assert min(ratios) < 0.7
    assert max(ratios) > 2.5
    assert len(np.unique(np.round(ratios, 2))) > 60
    canvases = {tile_image(question.picture, vision)[1] for question in questions}
    assert {(1, 2), (1, 3), (2, 2)} <= canvases
    assert max(rows * columns for rows, columns in canvases) <= 6


def drawn(monkeypatch, make, seed):
    """A question, and what was drawn for it."""
    seen = []
    for name in ("written", "bars"):
        whole = getattr(tasks, name)
        monkeypatch.setattr(tasks, name, lambda random, values, *rest, whole=whole: seen.append([*values]) or whole(random, values, *rest))
    return make(np.random.default_rng(seed)), seen[0]


@pytest.mark.parametrize("seed", range(20))
def test_numbers_are_what_is_written(monkeypatch, seed):
    question, (number,) = drawn(monkeypatch, tasks.read, seed)
    assert question.answer == f"{number}."
    assert 10 <= number < 1000
    question, numbers = drawn(monkeypatch, tasks.add, seed)
    assert question.answer == f"{numbers[0]} + {numbers[1]} = {sum(numbers)}."
    question, numbers = drawn(monkeypatch, tasks.compare, seed)
    larger, smaller = map(int, re.fullmatch(r"(\d+) is larger than (\d+)\.", question.answer).groups())
    assert {larger, smaller} == set(numbers)
    assert larger > smaller


@pytest.mark.parametrize("seed", range(20))
def test_bars_are_what_is_drawn(monkeypatch, seed):
    question, heights = drawn(monkeypatch, tasks.longest, seed)
    assert question.answer == f"The {tasks.ORDINALS[heights.index(max(heights))]}."
    assert len(set(heights)) == len(heights)  # one alone is longest
    question, heights = drawn(monkeypatch, tasks.height, seed)
    asked = int(question.text[-2])
    assert question.answer == f"{heights[asked - 1]}."


def test_a_bar_is_as_high_as_it_says(monkeypatch):
    """In tenths of the picture, counted on one without noise."""
    monkeypatch.setattr(tasks, "NOISE", (0, 1e-9))
    picture = np.asarray(tasks.bars(np.random.default_rng(0), [2, 9]))
    left, right = np.array_split(picture > 0, 2, axis=1)
    assert abs(left.any(axis=1).mean() - 0.2) < 0.04
    assert abs(right.any(axis=1).mean() - 0.9) < 0.04


def test_every_digit_is_there(monkeypatch):
    """In its own cell: of 7 and 42 flush right the upper left cell alone is empty."""
    monkeypatch.setattr(tasks, "NOISE", (0, 1e-9))
    picture = np.asarray(tasks.written(np.random.default_rng(1), [7, 42], 2)) > 0
    cells = [half for row in np.array_split(picture, 2) for half in np.array_split(row, 2, axis=1)]
    assert [bool(cell.sum() > 20) for cell in cells] == [False, True, True, True]


def test_the_model_is_asked_and_taught(questions):
    """A prompt is the example without its answer, which is what is learned; nothing is outside the vocabulary."""
    directory = mini_directory()
    reading = reading_of(directory, Config.from_directory(directory))
    (prompt,), (example,) = tasks.prompts(questions[2:3], reading), tasks.examples(questions[2:3], reading)
    assert np.array_equal(example.ids[: len(prompt.ids)], prompt.ids)
    assert reading.tokenizer.decode(example.ids[example.learned][:-1].tolist()) == prompt.line["answer"] == questions[2].answer
    assert prompt.tiles == example.tiles == 5
