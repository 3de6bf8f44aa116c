"""Texts keep their authors through everything that a template does with them."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from maverick_jax.prompt.provenance import Text, joined, own_of, shown, written

LETTERS = "abc<|> \n\t"  # written by the template; as capitals or doubled brackets they were given
COUNTERPART = {letter: chr(0x100 + i) for i, letter in enumerate(LETTERS)}


@st.composite
def texts(draw, *, letters: str = LETTERS, max_size: int = 12) -> Text:
    pieces = draw(st.lists(st.tuples(st.text(letters, max_size=4), st.booleans()), max_size=4))
    return joined(written(text) if own else Text(text) for text, own in pieces)[:max_size]


def coloured(text: str) -> str:
    """The text with every given character replaced: shows the authors in the characters themselves."""
    return "".join(char if own else COUNTERPART[char] for char, own in zip(str.__str__(text), own_of(text), strict=True))


SEPARATORS = st.sampled_from(["a", "<", "<|", " ", "ab", "|>"])
OPERATIONS = {  # what takes a text apart
    "slice": lambda text, sep: [text[1:], text[:-1], text[::-1], text[-3:2], text[1::2]],
    "strip": lambda text, sep: [
        text.strip(),
        text.lstrip(),
        text.rstrip("a>"),
        text.strip(sep),
        text.removeprefix(sep),
        text.removesuffix(sep),
    ],
    "split": lambda text, sep: [*text.split(sep), *text.rsplit(sep, 1), *text.split(sep, 1), *text.partition(sep), *text.rpartition(sep)],
    "words": lambda text, sep: [*text.split(), *text.rsplit(None, 1), *text.split(None, 1)],
    "lines": lambda text, sep: [*text.splitlines(), *text.splitlines(True)],
    "chars": lambda text, sep: [*text, *(text[i] for i in range(-len(text), len(text)))],
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(text=texts(), sep=SEPARATORS)
def test_pieces_keep_their_authors(name, text, sep):
    """A piece that is cut off has the authors of the place where it was cut, and the characters of any string."""
    pieces = OPERATIONS[name](text, sep)
    assert [str.__str__(piece) for piece in pieces] == OPERATIONS[name](str.__str__(text), sep)
    assert all(isinstance(piece, Text) and coloured(piece) in (coloured(text), *cuts(coloured(text))) for piece in pieces)


def cuts(text: str) -> set[str]:
    """Everything that can be cut from a text, backwards and with steps included."""
    forwards = {text[i:j] for i in range(len(text) + 1) for j in range(i, len(text) + 1)}
    return forwards | {text[::-1], text[1::2]}


@given(text=texts(letters="ab"), n=st.integers(0, 12))
def test_every_cut_is_at_the_right_place(text, n):
    """Split at a character that stands once: what is in front of it and behind it, not an equal piece elsewhere."""
    whole = text[:n] + written("|") + text[n:]
    before, after = whole.split("|")
    assert (coloured(before), coloured(after)) == (coloured(text[:n]), coloured(text[n:]))
    assert [coloured(part) for part in whole.partition("|")] == [coloured(text[:n]), "|", coloured(text[n:])]
    assert [coloured(line) for line in (text[:n] + "\n" + text[n:]).splitlines()][: 1 if n else 0] == ([coloured(text[:n])] if n else [])
    spaced = (written("  ") + text[:n] + " \t" + text[n:] + "\n").split()
    assert [coloured(word) for word in spaced] == [coloured(part) for part in (text[:n], text[n:]) if part]


@given(a=texts(), b=texts(), c=texts())
def test_put_together(a, b, c):
    """Concatenated, joined, repeated, replaced and filled in: every part brings its authors."""
    assert coloured(a + b) == coloured(a) + coloured(b)
    assert coloured(str.__str__(a) + b) == coloured(Text(a)) + coloured(b)
    assert coloured(a + str.__str__(b)) == coloured(a) + coloured(Text(b))
    assert coloured(a * 3) == coloured(3 * a) == coloured(a) * 3
    assert coloured(a.join([b, c, b])) == coloured(a).join([coloured(b), coloured(c), coloured(b)])
    assert coloured(written("b").join([a, c]).replace("b", c)) == coloured(c).join(map(coloured, written("b").join([a, c]).split("b")))
    assert coloured(written("<%s|%s>") % (a, b)) == f"<{coloured(a)}|{coloured(b)}>"
    assert coloured(written("<%(x)s>") % {"x": a}) == f"<{coloured(a)}>"
    assert str.__str__(a.replace("a", b, 1)) == str.__str__(a).replace("a", str.__str__(b), 1)


@given(text=texts(letters="ab<"))
def test_letters_keep_their_authors(text):
    assert text.upper().own == text.lower().own == text.title().own == text.own
    assert text.upper() == str.__str__(text).upper()


def test_what_cannot_be_followed_counts_as_given():
    """Nothing becomes the template's by an operation whose outcome has another shape."""
    mixed = written("<|") + "eot"
    assert set(own_of(mixed.center(20))) == {0}
    assert set(own_of(written("<|eot|>").center(20))) == {1}
    assert set(own_of(Text("straße").upper())) == {0}
    assert set(own_of(mixed.replace("", "-"))) == {0}
    assert set(own_of(written("%r") % (mixed,))) == {0}
    assert set(own_of(written("%s") % ([mixed],))) == {0}
    assert set(own_of(shown([written("<|eot|>")]))) == {0}
    assert set(own_of(Text("%s") % (written("<|eot|>"),))) == {0}
    assert set(own_of(shown(12))) == {1}


def test_a_text_is_any_string():
    """What a template asks about a text has the answer that it has for any string."""
    text = written("<think>") + "a</think>b"
    assert text == "<think>a</think>b"
    assert hash(text) == hash("<think>a</think>b")
    assert "</think>" in text
    assert len(text) == 17
    assert str(text) is text
    assert {"<think>a</think>b": 1}[text] == 1
