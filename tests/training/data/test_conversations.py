"""Lines of a file as conversations, what of them is learned, and what is wrong with the others."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

import maverick_jax as mj
from maverick_jax.assets import mini_directory
from maverick_jax.errors import UserError
from maverick_jax.prompt import Tokenizer, load_template
from maverick_jax.training.data.conversations import Skipped, read_conversations
from maverick_jax.training.data.examples import Reading, fit
from maverick_jax.training.data.files import read_examples
from maverick_jax.training.data.pipeline import Batches, Order
from maverick_jax.training.data.rows import Conversations

CONFIG = mj.Config.from_directory(mini_directory())
READING = Reading(CONFIG, Tokenizer.from_directory(mini_directory()), load_template(mini_directory()))


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def write(tmp_path, *lines):
    file = tmp_path / "data.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def learned(example) -> str:
    return "".join(READING.tokenizer.spelling(int(id)).decode() for id in example.ids[example.learned])


GOOD = {"messages": [turn("user", "4 + 4?"), turn("assistant", "8.")]}


@pytest.mark.parametrize(
    "messages, expected",
    [
        (GOOD["messages"], "8.<|eot|>"),
        ([turn("system", "sums"), *GOOD["messages"], turn("user", "2 + 1"), turn("assistant", "3")], "8.<|eot|>3<|eot|>"),
        ([turn("user", "a"), turn("assistant", "b", weight=0), turn("user", "c"), turn("assistant", "d")], "d<|eot|>"),
    ],
)
def test_the_assistants_words_are_learned(tmp_path, messages, expected):
    """And the token that ends its turn, or it would never stop; nothing that others say."""
    (conversation,) = read_conversations(write(tmp_path, {"messages": messages}))
    assert learned(READING.example(conversation)) == expected


def test_calls_are_learned_too(tmp_path):
    """In the format of the releases; what the tool answers is not."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    messages = [turn("user", "1 + 2"), turn("assistant", None, tool_calls=[call]), turn("tool", "3"), turn("assistant", "3")]
    tools = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}}]
    (conversation,) = read_conversations(write(tmp_path, {"messages": messages, "tools": tools}))
    text = learned(Reading(CONFIG, READING.tokenizer, None).example(conversation))
    assert "add" in text
    assert text.endswith("3<|eot|>")
    assert text.count("3") == 1


def png(size=(70, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, "png")
    return stream.getvalue()


def test_pictures_in_every_spelling(tmp_path):
    """A file beside the data, an address with the bytes in it, the next of the line's images."""
    (tmp_path / "a.png").write_bytes(png())
    address = "data:image/png;base64," + base64.b64encode(png((10, 20))).decode()
    content = [{"type": "image", "image": "a.png"}, {"type": "image_url", "image_url": {"url": address}}, {"type": "image"}]
    line = {"messages": [turn("user", [*content, {"type": "text", "text": "?"}]), turn("assistant", "red")], "images": ["a.png"]}
    (conversation,) = read_conversations(write(tmp_path, line))
    example = READING.example(conversation)
    assert len(example.pictures) == 3
    assert example.tiles == sum(len(tiles) for tiles in READING.tiles(example.pictures)) > 3
    assert (example.ids == CONFIG.image_token_index).sum() == example.tiles * CONFIG.vision.tokens_per_tile


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "line 2: it is no JSON"),
        ("[1]", "line 2: it is no JSON object"),
        ({"text": "x"}, "line 2: it is no conversation, messages is None"),
        ({"messages": []}, r"line 2: it is no conversation, messages is \[\]"),
        ({"messages": [{"content": "x"}]}, "line 2: message .* needs a role"),
        ({"messages": [turn("user", "x")]}, "line 2: no message of the assistant is in it"),
        ({"messages": [turn("assistant", "x")]}, "line 2: its message 1 cannot be told from what comes before"),
        ({"messages": [turn("user", [{"type": "image"}]), turn("assistant", "x")]}, "line 2: a picture is None: give a file"),
        ({"messages": [turn("user", [{"type": "image", "image": "no.png"}]), turn("assistant", "x")]}, r"line 2: .*no\.png cannot be read"),
        ({"messages": GOOD["messages"], "images": ["a.png"]}, "line 2: 1 of its images have no place"),
        ({"messages": GOOD["messages"], "tools": "add"}, "line 2: tools is 'add': give a list"),
        ({"messages": [turn("user", [{"type": "image", "image": "data:image/png;base64,§"}])]}, "line 2: a picture is no base64"),
        ({"messages": [turn("user", 5), turn("assistant", "x")]}, "line 2: .*content of type int"),
    ],
)
def test_a_bad_line(tmp_path, line, words):
    """Its number and the reason; --skip-bad goes on, and says how many it passed over."""
    file = write(tmp_path, GOOD, line, GOOD)
    with pytest.raises(UserError, match=words):
        read_examples(file, READING, length=64)
    examples, told = read_examples(file, READING, length=64, skip_bad=True)
    assert len(examples) == 2
    assert told[0].startswith(f"1 lines were passed over, such as: {file}, line 2:")


def test_files_that_have_nothing(tmp_path):
    """None there, an empty one, one of which all is dropped."""
    with pytest.raises(UserError, match=r"no\.jsonl cannot be read: No such file"):
        [*read_conversations(tmp_path / "no.jsonl")]
    with pytest.raises(UserError, match="has nothing to learn: it is empty"):
        read_examples(write(tmp_path, ""), READING, length=64)
    with pytest.raises(UserError, match=r"nothing to learn: 1 examples have more than 4 tokens and were dropped"):
        read_examples(write(tmp_path, GOOD), READING, length=4)
    with pytest.raises(UserError, match="long is 'keep': it must be one of drop, cut-start, cut-end"):
        read_examples(write(tmp_path, GOOD), READING, length=4, long="keep")
    skipped = Skipped()
    assert not [*read_conversations(write(tmp_path, "?", "?"), skipped=skipped)]
    assert skipped.count == 2


def test_longer_examples(tmp_path):
    """Cut at the stated side, if something is left to learn; never through a picture."""
    (conversation,) = read_conversations(write(tmp_path, GOOD))
    example, patch = READING.example(conversation), CONFIG.image_token_index
    n = len(example.ids)
    assert fit(example, n, "drop", patch) is example
    assert fit(example, n - 1, "drop", patch) is None
    assert fit(example, n - 2, "cut-start", patch).ids.tolist() == example.ids[2:].tolist()
    assert fit(example, n - 1, "cut-end", patch).ids.tolist() == example.ids[:-1].tolist()
    assert fit(example, n - example.learned.sum(), "cut-end", patch) is None
    assert fit(example._replace(ids=np.where(np.arange(n) == 1, patch, example.ids)), n - 2, "cut-start", patch) is None


def test_batches_from_any_step_on(tmp_path):
    """The same order for the same seed, taken up where it was left, every example once in an epoch."""
    lines = [{"messages": [turn("user", f"{n}"), turn("assistant", f"{n % 7}" * (1 + n % 5))]} for n in range(23)]
    examples, _ = read_examples(write(tmp_path, *lines), READING, length=64)
    order, rows = Order(rows=2, accumulate=2, seed=3), Conversations(examples, READING, 64)
    one, other = (Batches(rows, order) for _ in range(2))
    first = [one.take()[0] for _ in range(4)]
    state = one.state()
    rest = [one.take()[0] for _ in range(3)]
    for batch in first:
        assert batch.ids_BT.shape == (2, 2, 64)
        assert (other.take()[0].ids_BT == batch.ids_BT).all()
    fresh = Batches(rows, order)
    fresh.go_to(json.loads(json.dumps(state)))
    for batch in rest:
        assert (fresh.take()[0].ids_BT == batch.ids_BT).all()
    alone = Batches(Conversations(examples, READING, 64, packing=False), Order(rows=1))
    epochs = [[alone.take()[0].ids_BT.tobytes() for _ in range(23)] for _ in range(2)]
    assert len(set(epochs[0])) == 23
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) == set(epochs[1])
