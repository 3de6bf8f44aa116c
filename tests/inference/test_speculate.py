"""Drafts from a text's own past, against a search through all of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maverick_jax.errors import UserError
from maverick_jax.inference import speculate
from maverick_jax.inference.speculate import Acceptance, Drafts, PromptLookup

FEW = st.lists(st.integers(0, 3), max_size=60)  # so few tokens that they repeat themselves


def searched(tokens: list[int], n_grams: list[int], most: int) -> list[int]:
    """The same by looking at every place, the newest first."""
    for n in n_grams:
        for place in range(len(tokens) - 1, n - 1, -1):
            if tokens[place - n : place] == tokens[-n:]:
                whole = list(tokens)
                for at in range(place, place + most):
                    whole.append(whole[at])
                return whole[len(tokens) :]
    return []


@settings(max_examples=300, deadline=None)
@given(prompt=FEW, answer=FEW, n_grams=st.lists(st.integers(1, 4), min_size=1, max_size=3), most=st.integers(0, 6), data=st.data())
def test_the_index_finds_what_a_search_finds(prompt, answer, n_grams, most, data):
    """After every step, whatever the portions are that an answer grows by."""
    drafts: Drafts = PromptLookup(prompt, n_grams=n_grams, draft=4)
    known = list(prompt)
    while True:
        assert drafts.propose(most) == searched(known, n_grams, min(most, 4))
        if len(known) == len(prompt) + len(answer):
            return
        size = data.draw(st.integers(1, 5))
        portion = answer[len(known) - len(prompt) :][:size]
        drafts.extend(portion)
        known += portion


def test_the_longest_n_gram_and_its_newest_place_count():
    """Two tokens agree more often by chance than three, and what was said last is said again."""
    assert PromptLookup([1, 2, 3, 10, 2, 3, 20, 1, 2, 3], draft=2).propose(9) == [10, 2]
    assert PromptLookup([1, 2, 3, 10, 1, 2, 3, 20, 1, 2, 3], draft=1).propose(9) == [20]


def test_a_text_that_repeats_itself_is_drafted_in_full():
    """The newest place is just behind: what follows it there is the draft itself."""
    assert PromptLookup([5, 5, 5, 5]).propose(9) == [5, 5, 5, 5]
    assert PromptLookup([1, 2, 1, 2, 1]).propose(3) == [2, 1, 2]


def test_no_draft_is_longer_than_asked():
    """One token more would be written over the chunk's border."""
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 1, 2], draft=6)
    assert [len(lookup.propose(most)) for most in (0, 1, 5, 6, 7)] == [0, 1, 5, 6, 6]


def test_only_the_end_of_a_long_prompt_is_looked_at(monkeypatch):
    """An entry for each of a million tokens would take a quarter of a gigabyte."""
    monkeypatch.setattr(speculate, "WINDOW", 4)
    assert PromptLookup([1, 2, 9, 3, 1, 2]).propose(1) == []
    assert PromptLookup([1, 2, 9, 1, 2]).propose(1) == []
    assert PromptLookup([3, 1, 2, 1, 2]).propose(1) == [1]


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(draft=0), "draft is 0"),
        (dict(draft=65), "draft is 65"),
        (dict(draft=2.5), "draft is 2.5"),
        (dict(n_grams=()), r"n_grams is \(\)"),
        (dict(n_grams=3), "n_grams is 3"),
        (dict(n_grams=(3, 0)), r"n_grams is \(3, 0\)"),
        (dict(n_grams=(9,)), r"n_grams is \(9,\)"),
        (dict(n_grams="32"), "n_grams is '32'"),
        (dict(n_grams=[1.5]), "n_grams holds 1.5"),
    ],
    ids=lambda value: ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_settings_that_are_refused(settings, says):
    """Before the first token."""
    with pytest.raises(UserError, match=says):
        PromptLookup([1, 2, 3], **settings)


def test_acceptance():
    """Without drafts nothing is divided by zero, and a step gives its one token."""
    counted = Acceptance()
    assert (counted.rate, counted.tokens_per_step) == (0.0, 1.0)
    counted.count(4, 3)
    counted.count(2, 0)
    assert (counted.steps, counted.rate, counted.tokens_per_step) == (2, 0.5, 2.5)
