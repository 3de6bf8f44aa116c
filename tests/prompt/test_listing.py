"""A prompt token by token: the tokens are those that the model gets, and each knows who wrote it."""

import numpy as np
import pytest
from PIL import Image

from maverick_jax.errors import UserError
from maverick_jax.prompt import Tokenizer, load_template, render, user_message
from maverick_jax.prompt.chat import compose
from maverick_jax.prompt.listing import list_tokens
from maverick_jax.training.mini.definition import CHAT_TEMPLATE, mini_tokenizer
from oracle.scripted import CONFIG, TOKENIZER

WIDE = Image.new("RGB", (60, 32))  # 1 x 2 tiles and the whole


@pytest.fixture(params=["releases", "template"])
def template(request, tmp_path):
    if request.param == "releases":
        return None
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return load_template(tmp_path)


@pytest.mark.parametrize("text", ["What?", "<|eot|>typed", "é😀\n\n", " <|image|>"])
def test_they_are_what_is_rendered(template, text):
    """Pictures and control tokens that are typed included."""
    messages = [{"role": "system", "content": "Be brief."}, user_message(text, [WIDE, np.zeros((4, 4))])]
    tokens = list_tokens(*compose(messages, TOKENIZER, template=template), TOKENIZER, CONFIG)
    assert [token.id for token in tokens] == render(messages, TOKENIZER, CONFIG, template=template).token_ids
    words = b"".join(token.spelling for token in tokens if token.source == "text").decode()
    assert words == f"Be brief.{text}"
    assert not any(token.special for token in tokens if token.source == "text")
    assert {token.source for token in tokens} == {"template", "text", "picture 1", "picture 2"}
    patches = [token.source for token in tokens if token.spelling == b"<|patch|>"]
    assert (patches.count("picture 1"), patches.count("picture 2")) == (12, 4)


def test_a_token_that_joins_template_and_text(tmp_path):
    """A template that ends a line lends its line break to the text's own."""
    (tmp_path / "chat_template.jinja").write_text("a \n{{ messages[0].content }}")
    pieces, _ = compose([{"role": "user", "content": "\nb"}], TOKENIZER, template=load_template(tmp_path))
    tokens = list_tokens(pieces, [], TOKENIZER, CONFIG)
    assert [(token.spelling, token.source) for token in tokens if b"\n\n" in token.spelling] == [(b"\n\n", "template + text")]
    assert tokens[0].source == "template"
    assert tokens[-1].source == "text"


def test_a_tokenizer_that_changes_its_text():
    """Who wrote what cannot be followed: all from there counts as given."""
    tokenizer = Tokenizer(mini_tokenizer() | {"normalizer": {"type": "Lowercase"}})
    pieces, _ = compose([{"role": "user", "content": "ABC"}], tokenizer)
    tokens = list_tokens(pieces, [], tokenizer, CONFIG)
    assert [token.source for token in tokens if token.spelling in (b"a", b"b", b"c", b"abc")] == ["text"] * 3


def test_pictures_without_a_place(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("no pictures")
    pieces, images = compose([user_message("?", [WIDE])], TOKENIZER, template=load_template(tmp_path))
    with pytest.raises(UserError, match="placed 0 of 1 pictures"):
        list_tokens(pieces, images, TOKENIZER, CONFIG)
