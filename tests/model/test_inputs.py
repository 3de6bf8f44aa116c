"""What the model is handed: wrong shapes, dtypes, ids, lengths and caches are one line; padding counts for nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from maverick_jax.errors import UserError
from maverick_jax.inference.cache import KVCache
from oracle.forward import cached_step, logits
from oracle.plain import PATCH, SIDE, VISION, plain_config, plain_model

IDS = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32)
TILES = np.random.default_rng(0).uniform(-1, 1, (2, 3, SIDE, SIDE)).astype(np.float32)
SMALL = dict(num_hidden_layers=2, moe_layers=())  # what is not jitted is compiled step by step
ROOM = 8


@pytest.fixture(scope="module")
def model():
    return plain_model(**SMALL)


@pytest.fixture(scope="module")
def seeing():
    return plain_model(vision=VISION, **SMALL)


def cache(batch=2, *, held=(0, 0), **text):
    made = KVCache.create(plain_config(**{**SMALL, **text}).text, batch, ROOM, jnp.float32)
    return dataclasses.replace(made, lengths_B=jnp.array(held, jnp.int32)) if any(held) else made


IDS_KIND = r"expected whole numbers \[B, T\]"
LENGTHS = "expected 2 whole numbers, the real tokens of every row"


@pytest.mark.parametrize(
    "ids, options, message",
    [
        (IDS[0], {}, rf"token_ids is int32 \[4\]: {IDS_KIND}"),
        (IDS[None], {}, rf"token_ids is int32 \[1, 2, 4\]: {IDS_KIND}"),
        (IDS[:, :0], {}, rf"token_ids is int32 \[2, 0\]: {IDS_KIND}"),
        (IDS + 0.9, {}, rf"token_ids is float64 \[2, 4\]: {IDS_KIND}"),
        (IDS > 2, {}, rf"token_ids is bool \[2, 4\]: {IDS_KIND}"),
        ("text", {}, IDS_KIND),
        ([[1, 2], [3]], {}, "token_ids is no array"),
        (IDS - 2, {}, r"token_ids has ids outside 0\.\.63"),
        (IDS + 56, {}, r"token_ids has ids outside 0\.\.63"),
        (IDS.astype(np.int64) + 2**32, {}, r"token_ids has ids outside 0\.\.63"),
        (jnp.asarray(IDS) + 60, {}, r"token_ids has ids outside 0\.\.63"),
        (IDS, dict(lengths=4), rf"lengths is int64 \[\]: {LENGTHS}"),
        (IDS, dict(lengths=[4]), rf"lengths is int64 \[1\]: {LENGTHS}"),
        (IDS, dict(lengths=[[4, 4]]), rf"lengths is int64 \[1, 2\]: {LENGTHS}"),
        (IDS, dict(lengths=[1.5, 2]), rf"lengths is float64 \[2\]: {LENGTHS}"),
        (IDS, dict(lengths=[True, False]), rf"lengths is bool \[2\]: {LENGTHS}"),
        (IDS, dict(lengths=[4, 5]), r"lengths is \[4, 5\]: rows of 4 tokens have between 0 and 4 real ones"),
        (IDS, dict(lengths=[-1, 4]), r"lengths is \[-1, 4\]"),
        (IDS, dict(tiles=TILES), "no vision tower"),
        (IDS, dict(cache=cache(3)), r"the cache has 2 layers .*\[\(3, 1, 8\)\], this call needs 2 of \(2, 1, 8\)"),
        (IDS, dict(cache=cache(head_dim=4)), r"\[\(2, 1, 4\)\], this call needs"),
        (IDS, dict(cache=cache(num_hidden_layers=1, nope_layers=())), "the cache has 1 layers .* this call needs 2"),
        (IDS, dict(cache=cache(held=(5, 4))), "the cache has room for 8 tokens; 5 are in it and 4 are added"),
        (IDS, dict(cache=cache(held=(4, 5))), "the cache has room for 8 tokens; 5 are in it and 4 are added"),
        (IDS, dict(cache=cache(held=(2, 6)), lengths=[4, 3]), "6 are in it and 3 are added"),
    ],
)
def test_wrong_inputs(model, ids, options, message):
    """JAX reads an id outside the table as another one, broadcasts lengths, and writes beyond a cache without a word."""
    with pytest.raises(UserError, match=message):
        model(ids, **options)


@pytest.mark.parametrize("ids, lengths", [((4,), (2,)), ((2, 4), (3,)), ((2, 4), (2, 1))])
def test_shapes_are_checked_under_jit(model, ids, lengths):
    """Values are unknown there, shapes are not."""
    with pytest.raises(UserError, match="expected"):
        jax.eval_shape(lambda i, n: model(i, lengths=n), *(jax.ShapeDtypeStruct(s, jnp.int32) for s in (ids, lengths)))


@pytest.mark.parametrize(
    "tiles, message",
    [
        (TILES[:, :1], r"tiles is float32 \[2, 1, 28, 28\]: expected float32 \[N, 3, 28, 28\] in -1..1"),
        (TILES[0], r"tiles is float32 \[3, 28, 28\]"),
        ((TILES * 127).astype(np.uint8), "tiles is uint8"),
        (TILES * np.nan, "tiles has values from nan to nan"),
        (TILES * 255, "tiles has values from -25"),
        (TILES[:1], r"2 <\|patch\|> tokens, the tiles make 1 image features"),
        (None, r"2 <\|patch\|> tokens, the tiles make 0 image features"),
    ],
)
def test_wrong_tiles(seeing, tiles, message):
    """A picture in bytes or of another size would be seen as another one."""
    with pytest.raises(UserError, match=message):
        seeing([[1, PATCH, PATCH]], tiles)


def test_padding_is_no_length(model):
    """Room in the cache is for the tokens that are there: rows may be padded beyond its end, and continue to its last slot."""
    _, full = cached_step(model, jnp.asarray(IDS), jnp.array([4, 2], jnp.int32), cache())
    wide = np.full((2, 12), 9, np.int32)
    wide[0, :4], wide[1, :6] = IDS[1], [7, 6, 5, 4, 3, 2]
    ours, full = model(wide, lengths=np.array([4, 6]), cache=full)
    assert full.lengths_B.tolist() == [ROOM, ROOM]
    assert_allclose(ours[0, :4], logits(model, [[*IDS[0], *IDS[1]]])[0, 4:], atol=1e-5)
    assert_allclose(ours[1, :6], logits(model, [[5, 6, 7, 6, 5, 4, 3, 2]])[0, 2:], atol=1e-5)
    with pytest.raises(UserError, match="room for 8 tokens; 8 are in it and 1 are added"):
        model(IDS, lengths=[0, 1], cache=full)
    assert model(IDS, lengths=[0, 0], cache=full)[1].lengths_B.tolist() == [ROOM, ROOM]


def test_what_padding_holds_is_nobodys(seeing):
    """A `<|patch|>` token in the padding takes no feature from the rows behind it, and ids outside the vocabulary are not read."""
    ids = np.array([[1, PATCH, PATCH, -1], [2, 3, 4, PATCH]])
    ours = seeing(ids, TILES, lengths=[2, 4])
    assert_allclose(ours[0, :2], seeing(ids[:1, :2], TILES[:1])[0], atol=1e-5)
    assert_allclose(ours[1], seeing(ids[1:], TILES[1:])[0], atol=1e-5)


def test_other_integers_and_lists_are_fine(model):
    """int64 is NumPy's default, and a byte holds the ids of a small vocabulary."""
    expected = model(IDS)
    for ids in (IDS.tolist(), IDS.astype(np.int64), IDS.astype(np.uint8), jnp.asarray(IDS, jnp.uint8)):
        assert (model(ids, lengths=[4, 4]) == expected).all()
