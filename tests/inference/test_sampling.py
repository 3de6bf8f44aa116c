"""Sampling: the tokens that top-k, top-p and min-p leave are exactly those of their definitions, and draws follow the model."""

import dataclasses
import re
import reprlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maverick_jax.errors import UserError
from maverick_jax.inference.sampling import RowSampling, Sampling, sample

ROWS = 4000
PROBABILITIES = np.array([0.02, 0.3, 0.1, 0.05, 0.25, 0.08, 0.2], np.float32)
LOGITS = np.log(PROBABILITIES)
sample_rows = jax.jit(lambda logits, rows, step: sample(logits, rows, jnp.full(len(logits), step)).token_B)


def drawn(step: int = 0, rows: int = ROWS, **settings) -> np.ndarray:
    """One token for each of many rows with the same logits."""
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (rows, len(LOGITS)))
    return np.asarray(sample_rows(logits, RowSampling.repeat(Sampling(**settings), rows), jnp.int32(step)))


def kept(temperature=1.0, top_k=None, top_p=None, min_p=None) -> dict[int, float]:
    """Tokens and probabilities that are left, filter after filter, by their definitions."""
    scaled = np.exp(LOGITS.astype(np.float64) / temperature)
    left = dict(enumerate(scaled))
    left = dict(sorted(left.items(), key=lambda item: -item[1])[: top_k or len(left)])
    total, reached, nucleus = sum(left.values()), 0.0, {}
    for token, p in left.items():  # the most likely tokens until they together reach top_p
        if reached >= (top_p or 2.0):
            break
        nucleus[token] = p / total
        reached += p / total
    best = max(nucleus.values())
    nucleus = {token: p for token, p in nucleus.items() if p >= (min_p or 0.0) * best}
    return {token: p / sum(nucleus.values()) for token, p in nucleus.items()}


def test_greedy_takes_the_most_likely():
    """Temperature 0 depends on no seed, and takes the lowest id on a tie."""
    assert set(drawn(temperature=0.0)) == {1}
    tied = jnp.zeros((2, 5))
    assert sample_rows(tied, RowSampling.repeat(Sampling(), 2), jnp.int32(0)).tolist() == [0, 0]


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=1.0),
        dict(temperature=0.5),
        dict(temperature=2.0),
        dict(temperature=1.0, top_k=1),
        dict(temperature=1.0, top_k=3),
        dict(temperature=1.0, top_p=0.6),
        dict(temperature=1.0, top_p=0.01),
        dict(temperature=1.0, min_p=0.5),
        dict(temperature=1.0, min_p=1.0),
        dict(temperature=0.7, top_k=5, top_p=0.7, min_p=0.3),
        dict(temperature=1.5, top_k=100, top_p=1.0, min_p=0.0),
    ],
    ids=str,
)
def test_draws_follow_what_the_filters_leave(settings):
    """No token outside, none missing inside, and frequencies that a chi-square test of 1 in 10,000 does not refuse."""
    expected = kept(**settings)
    counts = np.bincount(drawn(**settings), minlength=len(LOGITS))
    assert set(np.flatnonzero(counts)) == set(expected)
    chi_square = sum((counts[token] - ROWS * p) ** 2 / (ROWS * p) for token, p in expected.items())
    quantiles = [0, 15.1, 18.4, 21.1, 23.5, 25.7, 27.9]  # of 1 - 1e-4, by degrees of freedom
    assert chi_square <= quantiles[len(expected) - 1] + 1e-6


def test_seeds_are_reproducible_and_differ():
    """Same seed, same tokens; another seed, another step and another row draw anew."""
    first = drawn(temperature=1.0, seed=7, rows=50)
    assert (first == drawn(temperature=1.0, seed=7, rows=50)).all()
    assert (first != drawn(temperature=1.0, seed=8, rows=50)).any()
    assert (first != drawn(temperature=1.0, seed=7, rows=50, step=1)).any()
    assert len(set(first)) > 1


def test_rows_have_their_own_settings():
    """A greedy row in a batch stays greedy whatever its neighbours ask for."""
    rows = RowSampling.repeat(Sampling(temperature=5.0), 200)
    rows.temperature_B[::2] = 0
    tokens = np.asarray(sample_rows(jnp.broadcast_to(jnp.asarray(LOGITS), (200, len(LOGITS))), rows, jnp.int32(0)))
    assert set(tokens[::2]) == {1}
    assert len(set(tokens[1::2])) > 3


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(top_k=1), {2}),
        (dict(top_k=2), {2, 1}),
        (dict(top_k=3), {2, 1, 3}),
        (dict(top_p=0.35), {2, 1}),  # 0.3, then three of 0.2
        (dict(top_p=0.65), {2, 1, 3}),
        (dict(min_p=0.6), {2, 1, 3, 4}),
        (dict(top_k=3, top_p=0.75, min_p=0.6), {2, 1, 3}),
        (dict(), {0, 1, 2, 3, 4}),
    ],
    ids=str,
)
def test_of_equal_tokens_the_first_are_kept(settings, expected):
    """A threshold alone would keep three tokens where two were asked for; in the sorted row the lower ids come first."""
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.2, 0.2], jnp.float32))
    rows = RowSampling.repeat(Sampling(temperature=1.0, **settings), 500)
    assert set(np.asarray(sample_rows(jnp.broadcast_to(logits, (500, 5)), rows, jnp.int32(0))).tolist()) == expected


def test_tokens_that_are_all_equal():
    """The first k of a row without any order, whatever k, in every row of a batch alike."""
    rows = RowSampling.repeat(Sampling(temperature=1.0, top_k=3), 400)
    assert set(np.asarray(sample_rows(jnp.zeros((400, 9)), rows, jnp.int32(0))).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("top_k", [7, 2**31 - 1, 2**31, 2**40, 10**30])
def test_more_than_there_are_is_all(top_k):
    """A top-k beyond the vocabulary keeps everything, though int32 does not hold it."""
    assert set(drawn(temperature=2.0, top_k=top_k)) == set(range(7))


NUMBERS = ("1", None, [1.0], 1j, True)


@pytest.mark.parametrize(
    "settings",
    [
        *(dict(temperature=value) for value in (-0.1, float("nan"), float("inf"), 1e300, 10**400, *NUMBERS)),
        *(dict(top_k=value) for value in (0, -1, 2.7, 2.0, float("nan"), "1", [1], True)),
        *(dict(top_p=value) for value in (0.0, -1, 1.1, float("nan"), "1", [1.0], True)),
        *(dict(min_p=value) for value in (-0.1, 1.5, float("nan"), "1", True)),
        *(dict(seed=value) for value in (-1, 2**32, 1.0, "1", None, True, float("nan"))),
        *(dict(repetition_penalty=value) for value in (0, -1.0, 1000, float("nan"), float("inf"), *NUMBERS)),
        *(dict(presence_penalty=value) for value in (-2.1, 2.1, float("nan"), *NUMBERS)),
        *(dict(frequency_penalty=value) for value in (-2.1, 2.1, float("nan"), *NUMBERS)),
        *(dict(min_tokens=value) for value in (-1, 1.0, "1", None, True)),
        *(dict(logprobs=value) for value in (-1, 21, 1.0, "1", True)),
    ],
    ids=lambda settings: str(settings)[:40],
)
def test_settings_outside_their_range_are_refused(settings):
    """The message names the setting and its value."""
    ((name, value),) = settings.items()
    with pytest.raises(UserError, match=re.escape(f"{name} is {reprlib.repr(value)}: it must be ")):
        Sampling(**settings)


@pytest.mark.parametrize("seed, place", [([-1], 0), ([0, 2**32], 1), ([0, 1.5], 1), ([[1]], 0), (np.array([0.5]), 0)], ids=str)
def test_a_wrong_seed_among_many(seed, place):
    """It is found by its place."""
    with pytest.raises(UserError, match=f"seed {place} is "):
        Sampling(seed=seed)


@pytest.mark.parametrize(
    "bias, said",
    [
        ([1], "logit_bias is [1]: expected a dict from token ids to what is added to their logits."),
        (3, "logit_bias is 3: expected a dict"),
        ({"3": 1.0}, "logit_bias has the key '3': expected token ids, whole numbers from 0 on."),
        ({-1: 1.0}, "logit_bias has the key -1: expected token ids"),
        ({True: 1.0}, "logit_bias has the key True: expected token ids"),
        ({3: "1"}, "logit_bias of token 3 is '1': it must be a number between -100 and 100."),
        ({3: float("nan")}, "logit_bias of token 3 is nan: it must be"),
        ({3: -101}, "logit_bias of token 3 is -101: it must be"),
        (dict.fromkeys(range(301), 1.0), "logit_bias has 301 tokens: at most 300 are taken."),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_bias(bias, said):
    """It is found by its token."""
    with pytest.raises(UserError, match=re.escape(said)):
        Sampling(logit_bias=bias)


def test_a_bias_of_a_token_that_there_is_not():
    """Only the vocabulary's size can tell; a bias that hits nothing would be silent."""
    with pytest.raises(UserError, match=re.escape("logit_bias has token id 50 outside 0..49: is it from another tokenizer?")):
        Sampling(logit_bias={3: 1, 50: 1}).check_vocabulary(50)
    Sampling(logit_bias={49: 1}).check_vocabulary(50)
    Sampling().check_vocabulary(50)


def test_what_needs_more_than_logits():
    """Rows that ask for nothing of it go through the smaller program."""
    plain = [Sampling(), Sampling(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1, seed=3), Sampling(logit_bias={})]
    more = [dict(repetition_penalty=1.1), dict(presence_penalty=1), dict(frequency_penalty=1), dict(logit_bias={1: 1}), dict(min_tokens=1)]
    assert not any(one.has_extras for one in plain)
    assert all(Sampling(**one).has_extras for one in [*more, dict(logprobs=0)])


def test_numbers_of_numpy_and_jax_are_numbers():
    """What comes out of an array is as good as a Python number, and is one afterwards."""
    given = dict(temperature=np.float32(0.5), top_k=np.int64(3), top_p=jnp.float32(0.5), min_p=np.float16(0.5), seed=jnp.int32(7))
    given |= dict(repetition_penalty=np.float32(2), presence_penalty=1, frequency_penalty=jnp.float32(1), min_tokens=np.int8(3))
    sampling = Sampling(**given, logit_bias={np.int32(3): np.float32(2)}, logprobs=np.int64(0))
    plain = dict(temperature=0.5, top_k=3, top_p=0.5, min_p=0.5, seed=7, repetition_penalty=2.0, presence_penalty=1.0)
    assert sampling == Sampling(**plain, frequency_penalty=1.0, min_tokens=3, logit_bias={3: 2.0}, logprobs=0)
    types = [float, int, float, float, int, float, float, float, dict, int, int]
    assert [type(value) for value in vars(sampling).values()] == types
    assert [type(x) for item in sampling.logit_bias.items() for x in item] == [int, float]
    assert hash(sampling) == hash(dataclasses.replace(sampling))
