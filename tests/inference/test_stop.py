"""Stop strings: what comes before one is passed on at once, the string itself never."""

import itertools

import pytest

from maverick_jax.inference.stop import StopStrings


def streamed(pieces, stop):
    stops = StopStrings(stop)
    parts = [stops.push(piece) for piece in pieces]
    return parts, "".join(parts) + ("" if stops.met else stops.flush()), stops.met


def cuts(text):
    """Every way to cut a text into three portions."""
    for a, b in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        yield [text[:a], text[a:b], text[b:]]


@pytest.mark.parametrize(
    "text, stop, expected, met",
    [
        ("one. END two", ["END"], "one. ", True),
        ("aab aaab", ["aaab"], "aab ", True),
        ("no end here", ["END"], "no end here", False),
        ("almost EN", ["END"], "almost EN", False),
        ("x\nUser: y\n", ["\nUser:", "\nSystem:"], "x", True),
        ("x. y, z", [".", ","], "x", True),
        ("anything", [], "anything", False),
        ("one. END two", "END", "one. ", True),
    ],
)
def test_however_the_text_arrives(text, stop, expected, met):
    """A stop string cut in two by the streaming must not slip through, nor may its beginning be shown."""
    for pieces in cuts(text):
        assert streamed(pieces, stop)[1:] == (expected, met)


def test_text_is_held_back_no_longer_than_needed():
    """Only what may begin a stop string waits; all else is shown as it arrives."""
    parts, _, _ = streamed(["hello", " E", "N", "x", "END"], ["END"])
    assert parts == ["hello", " ", "", "ENx", ""]


def test_nothing_comes_after_a_stop():
    """Tokens of the same decode call that follow the stop string are not shown."""
    stops = StopStrings(["."])
    assert stops.push("a.b") == "a"
    assert stops.push("c") == stops.flush() == ""
