"""What a caller asks for wrongly is one line that names it, before anything runs; what is unusual but right is taken as meant."""

import jax.numpy as jnp
import numpy as np
import pytest

from maverick_jax.errors import UserError
from maverick_jax.inference import room
from maverick_jax.inference.admission import admitted
from maverick_jax.inference.generate import generate
from maverick_jax.inference.request import Request
from maverick_jax.inference.room import room_for
from maverick_jax.inference.sampling import Sampling
from oracle.plain import PATCH, SIDE, VISION, plain_model

TILES = np.zeros((1, 3, SIDE, SIDE), np.float32)


@pytest.fixture(scope="module")
def model():
    return plain_model(num_hidden_layers=2)


@pytest.fixture(scope="module")
def seeing():
    return plain_model(vision=VISION, num_hidden_layers=2)


def message(model, *, prompts=([1, 2],), max_new_tokens=2, **options) -> str:
    with pytest.raises(UserError) as caught:
        generate(model, prompts, max_new_tokens=max_new_tokens, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    return str(caught.value)


FLAT = "a flat list of token ids: expected a list of prompts"
OUTSIDE = "prompt 0 has token ids outside 0..63"


@pytest.mark.parametrize(
    "prompts, expected",
    [
        ([1, 2, 3], FLAT),
        (np.arange(3), FLAT),
        (jnp.arange(3), FLAT),
        ("text", "prompts is 'text'"),
        (["text"], "prompt 0 is 'text': expected a list of token ids"),
        ([b"text"], "prompt 0 is b'text'"),
        (None, "prompts is None"),
        (7, "prompts is 7"),
        ({"a": [1]}, "prompts is {'a': [1]}"),
        ([{1, 2}], "prompt 0 is {1, 2}"),
        ([[1], None], "prompt 1 is None"),
        ([[1], [1, None]], "prompt 1 holds None: expected whole numbers"),
        ([[1], []], "prompt 1 is empty"),
        ([[[1, 2]]], "prompt 0 holds [1, 2]"),
        (np.zeros((1, 2, 2), np.int32), "prompt 0 holds [0, 0]"),
        ([[5.9]], "prompt 0 holds 5.9"),
        ([[5.0]], "prompt 0 holds 5.0"),
        (np.ones((1, 2)), "prompt 0 holds 1.0"),
        (np.ones((1, 2), bool), "prompt 0 holds True"),
        ([[3, True]], "prompt 0 holds True"),
        ([[3, np.True_]], "prompt 0 holds np.True_"),
        ([["3"]], "prompt 0 holds '3'"),
        ([[float("nan")]], "prompt 0 holds nan"),
        ([[64]], OUTSIDE),
        ([[-1]], OUTSIDE),
        ([[2**31]], OUTSIDE),
        ([[2**32 + 1]], OUTSIDE),
        ([[2**70]], OUTSIDE),
        (np.array([[2**40]]), OUTSIDE),
    ],
)
def test_prompts_that_are_none(model, prompts, expected):
    """5.9 would be read as 5, 2^32 + 1 as 1, True as 1, and a flat list ends deep in NumPy."""
    assert expected in message(model, prompts=prompts)


@pytest.mark.parametrize(
    "options, expected",
    [
        *((dict(max_new_tokens=value), "max_new_tokens is") for value in (0, -1, 2.5, 2.0, True, "3", None, float("inf"), -(10**5000))),
        *((dict(max_new_tokens=value), "prompt 0 has 2 tokens and up to") for value in (63, 2**40, 10**5000)),
        (dict(stop_ids="</s>"), "stop_ids is '</s>': expected a list of token ids"),
        (dict(stop_ids=2.0), "stop_ids is 2.0"),
        (dict(stop_ids=True), "stop_ids is True"),
        (dict(stop_ids=[1.5]), "stop_ids holds 1.5"),
        (dict(stop_ids=[[1]]), "stop_ids holds [1]"),
        (dict(stop_ids=[64]), "stop_ids has token ids outside 0..63"),
        (dict(stop_ids=-1), "stop_ids has token ids outside 0..63"),
        (dict(tiles=TILES), "no vision tower"),
    ],
)
def test_arguments_that_are_none(model, options, expected):
    """2.5 tokens would be two or three, and a stop token outside the vocabulary never comes."""
    assert expected in message(model, **options)


@pytest.mark.parametrize("prompts", [[[1] * 63], [[1], [1] * 63]])
def test_prompt_and_answer_fill_the_context_and_no_more(model, prompts):
    """Off by one either the last place is never used or a token is written beyond it."""
    assert generate(model, prompts, max_new_tokens=1, stop_ids=())
    assert "has 63 tokens and up to 2 are asked for, but the context holds 64" in message(model, prompts=prompts, max_new_tokens=2)


@pytest.mark.parametrize(
    "tiles, expected",
    [
        (TILES[0], "tiles is float32 [3, 28, 28]: expected float32 [N, 3, 28, 28] in -1..1, as tile_image makes them"),
        (TILES[None], "tiles is float32 [1, 1, 3, 28, 28]"),
        (np.zeros((1, 3, 56, 56), np.float32), "tiles is float32 [1, 3, 56, 56]"),
        (np.zeros((1, 1, 28, 28), np.float32), "tiles is float32 [1, 1, 28, 28]"),
        (np.zeros((1, 28, 28, 3), np.float32), "tiles is float32 [1, 28, 28, 3]"),
        (TILES.astype(np.uint8), "tiles is uint8 [1, 3, 28, 28]"),
        (TILES.astype(np.complex64), "tiles is complex64"),
        (TILES.astype(bool), "tiles is bool"),
        (TILES + np.nan, "tiles has values from nan to nan: expected float32 [N, 3, 28, 28] in -1..1"),
        (TILES - np.inf, "tiles has values from -inf to -inf"),
        (TILES + 255, "tiles has values from 255.0 to 255.0"),
        ([TILES[0], TILES[0, :2]], "tiles is no array"),
        ("picture.png", "tiles is <U11 []"),
        (7, "tiles is int64 []"),
        (np.repeat(TILES, 2, axis=0), "1 <|patch|> tokens, the tiles make 2 image features"),
        ([], "1 <|patch|> tokens, the tiles make 0 image features"),
    ],
)
def test_tiles_that_are_none(seeing, tiles, expected):
    """Bytes from 0 to 255 would be seen as pixels 255 times too bright, and another size ends in a reshape."""
    assert expected in message(seeing, prompts=[[1, PATCH]], tiles=tiles)


def test_what_is_unusual_is_taken_as_meant(model, seeing):
    """Arrays, tuples, ranges, generators, whole numbers of NumPy and JAX, tiles in other floats or in a list."""
    expected = generate(model, [[1, 2]], max_new_tokens=2, stop_ids=())
    for prompts in (
        ((1, 2),),
        np.array([[1, 2]], np.uint8),
        jnp.array([[1, 2]]),
        [range(1, 3)],
        ([i] for i in ()),
        [[np.int64(1), jnp.int32(2)]],
    ):
        assert generate(model, prompts, max_new_tokens=np.int8(2), stop_ids=np.array([], int)) in (expected, [])
    assert generate(model, [[1, 2]], max_new_tokens=2, stop_ids=expected[0][0]) == [[]]
    seen = generate(seeing, [[1, PATCH]], tiles=TILES, max_new_tokens=2, stop_ids=())
    for tiles in (TILES.astype(np.float64), TILES.astype(np.float16), jnp.asarray(TILES, jnp.bfloat16), list(TILES)):
        assert generate(seeing, [[1, PATCH]], tiles=tiles, max_new_tokens=2, stop_ids=()) == seen


def test_more_stop_tokens_than_can_be_kept_away(model):
    """One that is not kept away would end the answer at once."""
    request = Request(ids=[5], max_new_tokens=4, sampling=Sampling(min_tokens=2), stop_ids=range(4, 40))
    with pytest.raises(UserError, match=r"min_tokens keeps at most 32 stop tokens away, and there are 36"):
        admitted(request, model.config, 64)


def test_more_cache_than_there_is_memory(model, monkeypatch):
    """One line with both figures, instead of an allocator's pages."""
    monkeypatch.setattr(room, "free_bytes", lambda model: 1000)
    with pytest.raises(UserError, match=r"4 slots of up to 64 tokens, .* are asked for, but 0.0 MiB are free"):
        room_for(model, slots=4, max_length=64)


def test_what_is_no_model():
    """The name of a directory is not yet a model."""
    assert "model is 'my-model': open it with maverick_jax.load" in message("my-model")
