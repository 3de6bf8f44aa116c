"""Top-k, top-p, min-p: the candidates and the search through all keep exactly what the definitions say, ties included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from maverick_jax.inference.sampling import RowSampling, Sampling, filters, sample
from maverick_jax.inference.sampling.blocks import SHARES, block_sums, in_blocks
from oracle.kept import kept, probabilities

V = 576  # 64 blocks of 9


@pytest.fixture(scope="module", params=[128, 6], ids="{} candidates".format)
def candidates(request):
    """With 128 all blocks are candidates; with 6 seven of them, and the search must do what these cannot."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "CANDIDATES", request.param)
        yield request.param


@functools.cache
def compiled(candidates: int):
    """From logits [B, V], settings and steps: which tokens are kept, and surely; are the candidates enough, and a token [B, ...]."""

    def both(logits_BV, rows, step_B):
        logits_BNL = in_blocks(logits_BV)
        highest_BN = logits_BNL.max(axis=-1)
        weigh = filters.Weigh(logits_BV.max(axis=-1), rows.temperature_B)
        sums_BN = block_sums(logits_BNL, lambda x, _: weigh(x))
        total_B = filters._before_top_p(logits_BNL, sums_BN, jnp.ones(len(step_B), bool), weigh, rows)

        def one(token):
            token_B = jnp.full(len(step_B), token)
            kept_B, _ = filters.judged(logits_BNL, token_B, total_B, weigh, rows)
            return kept_B, filters.surely_kept(logits_BNL, highest_BN, token_B, sums_BN, weigh, rows)

        shares_BU = jnp.full((len(step_B), SHARES), 0.5)
        few = filters.among_candidates(logits_BNL, highest_BN, weigh, rows, sums_BN.sum(axis=-1), shares_BU)
        kept_VB, sure_VB = jax.lax.map(one, jnp.arange(logits_BV.shape[1], dtype=jnp.int32))
        return kept_VB.T, sure_VB.T, few.certain_B, sample(logits_BV, rows, step_B).token_B

    return jax.jit(both)


@functools.cache
def drawn(candidates: int):
    return jax.jit(lambda *arguments: sample(*arguments).token_B)


def stacked(settings: list[dict]) -> RowSampling:
    rows = [RowSampling.repeat(Sampling(**one), 1) for one in settings]
    return jax.tree.map(lambda *x: np.concatenate(x), *rows)


filtered = st.fixed_dictionaries(
    dict(
        temperature=st.sampled_from([0.3, 1.0, 2.5]),
        top_k=st.sampled_from([None, 1, 3, 6, 7, 50, 575, 576, 10**6]),
        top_p=st.sampled_from([None, 1e-300, 0.05, 0.3, 0.9, 0.999, 1.0]),
        min_p=st.sampled_from([None, 0.0, 0.01, 0.3, 1.0]),
        seed=st.integers(0, 2**32 - 1),
    )
)


@settings(max_examples=60, deadline=None)
@given(asked=st.lists(filtered, min_size=8, max_size=8), seed=st.integers(0, 2**32 - 1), step=st.sampled_from([0.0, 0.25, 1.0]))
def test_what_is_kept(candidates, asked, seed, step):
    """Eight rows with settings of their own; logits that are all different, or in steps, so that many are equal."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(8, V)) * rng.choice([0.01, 1, 4, 20], size=(8, 1))).astype(np.float32)
    if step:
        logits = np.round(logits / np.float32(step)) * np.float32(step)
    found, sure, certain, tokens = map(np.asarray, compiled(candidates)(logits, stacked(asked), np.zeros(8, np.int32)))
    assert not (sure & ~found).any()
    for row, one in enumerate(asked):
        must, may = kept(logits[row], **{name: value for name, value in one.items() if name != "seed"})
        assert set(must) <= set(np.flatnonzero(found[row])) <= set(may), one
        assert tokens[row] in may
        if step == 0 and (one["top_k"] or V) <= candidates:
            assert certain[row], "of different logits so many are always enough"


def test_surely_kept(candidates):
    """By its blocks alone most of what top-p keeps can be told, never what top-k cuts."""
    logits = np.random.default_rng(3).normal(size=(3, V)).astype(np.float32) * 3
    settings = [dict(temperature=1.0, top_p=0.9), dict(temperature=1.0, min_p=0.1), dict(temperature=1.0, top_p=0.9, top_k=100)]
    found, sure, _, _ = map(np.asarray, compiled(candidates)(logits, stacked(settings), np.zeros(3, np.int32)))
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    share = (p * sure).sum(axis=-1) / (p * found).sum(axis=-1)
    assert share[0] > 0.5
    assert share[1] == 1
    assert share[2] == 0


@pytest.mark.parametrize(
    "asked",
    [dict(), dict(top_k=4), dict(top_k=40), dict(top_p=0.3), dict(top_p=0.9), dict(min_p=0.2), dict(top_k=60, top_p=0.8, min_p=0.05)],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True], ids=["different", "tied"])
def test_draws_follow_the_probabilities(candidates, asked, tied):
    """No token outside, and frequencies that a chi-square test of 1 in 100,000 does not refuse."""
    logits = np.random.default_rng(5).normal(size=V).astype(np.float32) * 1.5
    logits = np.round(logits) if tied else logits
    rows, count = RowSampling.repeat(Sampling(temperature=1.0, **asked), 1000), 8
    many = jnp.broadcast_to(logits, (1000, V))
    tokens = np.concatenate([drawn(candidates)(many, rows, np.full(1000, step, np.int32)) for step in range(count)])
    p = probabilities(logits, **asked)
    counts = np.bincount(tokens, minlength=V)
    assert not counts[p == 0].any()
    expected = p * len(tokens)
    rare = expected < 10  # these together
    expected, seen = (np.append(x[~rare], x[rare].sum()) for x in (expected, counts))
    assert scipy.stats.chisquare(seen[expected > 0], expected[expected > 0]).pvalue > 1e-5


def test_top_p_that_is_reached_exactly(candidates):
    """The tokens that together reach it are enough: the next one is one too many."""
    logits = np.log(np.array([[0.25, 0.5, 0.25]], np.float32))
    assert compiled(candidates)(logits, stacked([dict(temperature=1.0, top_p=0.5)]), np.zeros(1, np.int32))[0].tolist() == [
        [False, True, False]
    ]


@pytest.mark.parametrize("top_p", [None, 1, 1.0, 1 - 1e-9])
def test_without_top_p_the_least_likely_token_stays(candidates, top_p):
    """Summed in float32, what comes before the last tokens can reach 1, and they would be cut off."""
    logits = np.linspace(0, -30, V, dtype=np.float32)[None]
    find = compiled(candidates)
    assert find(logits, stacked([dict(temperature=1.0, top_p=top_p)]), np.zeros(1, np.int32))[0].all()
    assert not find(logits, stacked([dict(temperature=1.0, top_p=0.9999999)]), np.zeros(1, np.int32))[0].all()


def test_a_row_alone_and_among_others(candidates):
    """What a row draws depends on no neighbour, whichever way these make the whole batch go."""
    rng = np.random.default_rng(3)
    asked = [
        dict(),
        dict(temperature=1.0),
        dict(temperature=0.7, top_k=3),
        dict(temperature=2.0, top_p=0.95),
        dict(temperature=1.0, min_p=0.1),
    ]
    asked += [dict(temperature=1.0, top_k=500, top_p=0.9), dict(temperature=5.0), dict(temperature=1.0, top_k=5, min_p=0.5)]
    asked = [one | dict(seed=i % 3) for i, one in enumerate(asked)]
    logits = rng.normal(size=(8, V)).astype(np.float32)
    find = drawn(candidates)
    for step in range(20):
        steps = (np.arange(8) * step).astype(np.int32)
        together = np.asarray(find(logits, stacked(asked), steps))
        order = rng.permutation(8)
        assert (together[order] == find(logits[order], stacked([asked[i] for i in order]), steps[order])).all()
        for i in range(step % 4, 8, 4):
            alone = find(logits[i : i + 1], stacked([asked[i]]), steps[i : i + 1])
            assert together[i] == alone[0], asked[i]
