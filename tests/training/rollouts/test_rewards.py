"""What answers are worth."""

import pytest

from maverick_jax.errors import UserError
from maverick_jax.training.rollouts.rewards import BadReward, parse, worth


@pytest.mark.parametrize(
    "words, text, answer, expected",
    [
        (["exact"], " 4\n", "4", 1),
        (["exact"], "4.", "4", 0),
        (["number"], "It is 1,204.50, so: 1204.5", "1204.50", 1),
        (["number"], "no idea", "4", 0),
        (["number"], "3 + 1 = 4", "4 apples", 1),
        (["json"], '{"a": 1, "b": [2]}', '{"b": [2], "a": 1}', 1),
        (["json"], '{"a": 1}', '{"a": 2}', 0),
        (["json"], "{a: 1}", None, 0),
        (["json"], "[1]", None, 1),
        (["format:[a-z]+\\."], "yes.", None, 1),
        (["format:[a-z]+\\."], "yes", None, 0),
        (["exact", "0.5*format:[0-9]+"], "4", "4", 1.5),
        (["exact", "0.5*format:[0-9]+"], "5", "4", 0.5),
        (["2*exact"], "4", "4", 2),
    ],
)
def test_worth(words, text, answer, expected):
    assert worth(parse(words), text, {"answer": answer}) == expected


def test_functions_of_a_file(tmp_path):
    """They get the text and the line; what they raise, and what is no number, is told."""
    file = tmp_path / "rewards.py"
    file.write_text("def short(text, line):\n    return line['most'] - len(text)\n\ndef bad(text, line):\n    return float('nan')\n")
    assert worth(parse([f"{file}:short"]), "four", {"most": 10}) == 6
    with pytest.raises(BadReward, match="the reward of 'four' raised KeyError: 'most'"):
        worth(parse([f"{file}:short"]), "four", {})
    with pytest.raises(BadReward, match="the reward of 'four' is nan: give a finite number"):
        worth(parse([f"{file}:bad"]), "four", {})
    with pytest.raises(UserError, match=r"rewards\.py has no function 'long'"):
        parse([f"{file}:long"])
    (tmp_path / "broken.py").write_text("def (")
    with pytest.raises(UserError, match=r"broken\.py cannot be read as rewards \(SyntaxError"):
        parse([f"{tmp_path / 'broken.py'}:f"])
    with pytest.raises(UserError, match=r"no\.py cannot be read as rewards \(FileNotFoundError"):
        parse([f"{tmp_path / 'no.py'}:f"])


@pytest.mark.parametrize(
    "word, words", [("exakt", "no reward 'exakt': give exact"), ("format:(", "no regular expression"), ("1..2*exact", "'1..2' of")]
)
def test_no_reward(word, words):
    with pytest.raises(UserError, match=words):
        parse([word])


def test_an_answer_is_needed():
    with pytest.raises(BadReward, match="the line has no answer to compare with"):
        worth(parse(["exact"]), "4", {})
