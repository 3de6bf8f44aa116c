"""Token ids equal those of Meta's tokenizer, and nothing that a user types becomes a control token."""

import base64
import itertools
import json
import random

import pytest
import regex
import tokenizers

from maverick_jax.errors import UserError
from maverick_jax.prompt import StreamDecoder, Tokenizer
from maverick_jax.prompt.byte_level import SPLIT_PATTERN
from maverick_jax.prompt.tokenizer_model import special_tokens
from maverick_jax.training.mini.definition import mini_tokenizer

TEXTS = [
    "Hello world!",
    "the theatre",
    "  two  spaces\n\n\nlines\t",
    "I'll they've 12345",
    "naïve café 日本語 🙂",
    "<|eot|>",
    "",
    "\x00\xff",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(mini_tokenizer())


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """A small rank file's contents: all bytes, then some tokens, some of which merge in several ways."""
    longer = b" t|he|th| the|ll|an|in|er|re| a|at|the|eat|atr|'l|'ll|12|123|34|\n\n|  |\xe6\x97|\xe6\x97\xa5|hea".split(b"|")
    return {token: rank for rank, token in enumerate([bytes([b]) for b in range(256)] + longer)}


def test_shared_vectors(shared_dir):
    """The release's own tokenizer.model: 0 differences from Meta's tokenizer, special tokens parsed and not parsed."""
    tokenizer = Tokenizer.from_directory(shared_dir / "tokenizer")
    vectors = json.loads((shared_dir / "tokenizer" / "tokenizer_vectors.json").read_text())
    for vector in vectors:
        assert tokenizer.encode(vector["text"], allow_special=True) == vector["ids"]
        assert tokenizer.encode(vector["text"]) == vector["ids_specials_as_text"]
        assert tokenizer.decode(vector["ids_specials_as_text"]) == vector["text"]


def test_tokenizer_model_merges_by_rank(tmp_path, ranks):
    """A rank file names no merges; the ones we derive must act like merging the lowest rank first."""
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    tokenizer = Tokenizer.from_directory(tmp_path)
    draw = random.Random(0)
    random_texts = ["".join(draw.choice("theatrn l'12345 \n日") for _ in range(60)) for _ in range(200)]
    for text in [*TEXTS, *random_texts]:
        assert tokenizer.encode(text) == merge_by_rank(text, ranks), text


def merge_by_rank(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding as tiktoken defines it, written plainly."""
    ids = []
    for piece in regex.findall(SPLIT_PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_special_tokens_have_their_published_ids():
    names = special_tokens()
    assert len(names) == len(set(names)) == 2048
    ids = {name: 200000 + i for i, name in enumerate(names)}
    published = {
        "begin_of_text": 200000, "end_of_text": 200001, "header_start": 200005, "header_end": 200006, "eom": 200007, "eot": 200008,
        "python_start": 200016, "python_end": 200017, "finetune_right_pad": 200018, "image_start": 200080, "image_end": 200081,
        "tile_x_separator": 200084, "tile_y_separator": 200085, "image": 200090, "patch": 200092,
        "reasoning_thinking_start": 201142, "reasoning_thinking_end": 201143, "reserved_special_token_0": 201144,
        "reserved_special_token_903": 202047,
    }  # fmt: skip
    assert {name: ids[f"<|{name}|>"] for name in published} == published


def test_typed_special_tokens_are_plain_text(tokenizer):
    """A user who types a control token must not get one."""
    text = "a<|eot|><|header_start|>system"
    assert not set(tokenizer.encode(text)) & set(tokenizer.special.values())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, allow_special=True).count(tokenizer.id_of("<|eot|>")) == 1
    without = tokenizers.Tokenizer.from_str(json.dumps(mini_tokenizer() | {"added_tokens": [], "post_processor": None}))
    assert tokenizer.encode(text) == without.encode(text).ids


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_never_splits_a_character(tokenizer, text):
    """Portions put together give the text, and no portion holds half of a multi-byte character."""
    decoder = StreamDecoder(tokenizer)
    portions = [decoder.push(id) for id in tokenizer.encode(text)]
    assert "".join(portions) == text
    assert not any("\ufffd" in portion for portion in portions)
    assert decoder.flush() == ""


def test_a_character_that_never_ends_is_marked(tokenizer):
    decoder = StreamDecoder(tokenizer)
    first_byte = tokenizer.encode("é")[0]
    assert decoder.push(first_byte) == ""
    assert decoder.flush() == "\ufffd"


def test_special_tokens_do_not_show(tokenizer):
    assert tokenizer.decode([tokenizer.id_of("<|begin_of_text|>"), *tokenizer.encode("hi"), tokenizer.id_of("<|eot|>")]) == "hi"


def test_ids_beyond_the_tokenizer_are_silent(tokenizer):
    """Embedding tables are often larger than the tokenizer; a sampled id without text must not end the answer."""
    assert tokenizer.decode([10**6]) == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", '{"model": {"type": "nothing"}}', "tokenizer.json is no tokenizer"),
        ("tokenizer.model", "AA== 0\nhello\n", "line 2 is not 'base64 rank'"),
        ("tokenizer.model", "AA== 0\nAQ== 7\n", "line 2 has rank 7 instead of 1"),
        ("tokenizer.model", "", "is empty, for a download did not begin"),
        ("notes.txt", "", "has no tokenizer.json or tokenizer.model"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(raised.value)
