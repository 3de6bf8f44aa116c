"""Drafts: a row's tokens are those that it would have drawn without one, and follow the model's probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from maverick_jax.inference.sampling import Extras, RowExtras, RowSampling, Sampling, accept, history_of, record, sample

V, T = 40, 4
NONE = -1
rng = np.random.default_rng(2)
LOGITS = (rng.normal(size=(V, V)) * 2).astype(np.float32)  # what follows a token: a model of one token's memory
SETTINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.8, top_k=9, seed=4),
    Sampling(temperature=2.0, top_p=0.8, seed=5),
]
agreed = jax.jit(accept)
one_by_one = jax.jit(sample)


def rows() -> RowSampling:
    return jax.tree.map(lambda *x: np.concatenate(x), *(RowSampling.repeat(one, 1) for one in SETTINGS))


def drawn_alone(newest: np.ndarray, steps: np.ndarray, given: Extras | None = None) -> np.ndarray:
    """[B, T]: one token after the other."""
    tokens, history = [newest], None if given is None else given.history_BV
    for t in range(T):
        now = None if given is None else given._replace(history_BV=history)
        token = one_by_one(LOGITS[tokens[-1]], rows(), steps + t, now).token_B
        history = None if history is None else record(history, jnp.arange(len(newest)), token)
        tokens.append(np.asarray(token))
    return np.stack(tokens[1:], axis=1)


@pytest.mark.parametrize("penalties", [False, True], ids=["plain", "penalties"])
@pytest.mark.parametrize("right", range(T + 1))
def test_tokens_are_those_without_a_draft(penalties, right):
    """As far as the draft is right its tokens count, and one more behind them; a short draft ends sooner."""
    newest, steps = np.array([1, 2, 3, 4]), np.array([0, 7, 2, 5], np.int32)
    given = None
    if penalties:
        one = Sampling(repetition_penalty=1.3, frequency_penalty=1.5, presence_penalty=0.5, min_tokens=6)
        histories = jnp.asarray([history_of([1, 2], [newest[i]], V) for i in range(4)])
        given = Extras(RowExtras.repeat(one, 4, stop_ids=[5, 6, 7]), histories)
    alone = drawn_alone(newest, steps, given)
    draft = alone[:, : T - 1].copy()
    if right < T - 1:
        draft[:, right] = NONE if right == 2 else (draft[:, right] + 1) % V
    logits = LOGITS[np.concatenate([newest[:, None], np.maximum(draft, 0)], axis=1)]
    count, sampled = agreed(logits, draft, rows(), steps, given)
    assert count.tolist() == [min(right, T - 1) + 1] * 4
    for row in range(4):
        assert sampled.token_B[row, : count[row]].tolist() == alone[row, : count[row]].tolist()


def test_a_draft_does_not_change_the_distribution():
    """Whatever is proposed, pairs of tokens follow p(a) p(b | a), by a chi-square test of 1 in 100,000."""
    many = 4000
    asked = RowSampling.repeat(Sampling(temperature=1.0, seed=11), many)
    newest = np.full(many, 9)
    draft = np.tile(np.argsort(-LOGITS[9])[:4], many // 4)[:, None]  # likely ones, so that many are taken
    count, sampled = agreed(LOGITS[np.concatenate([newest[:, None], draft], axis=1)], draft, asked, np.zeros(many, np.int32), None)
    first, second = np.asarray(sampled.token_B).T
    p = np.exp(LOGITS.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    taken = np.asarray(count) == 2
    assert (taken == (first == draft[:, 0])).all()
    assert 0.1 < taken.mean() < 0.6

    def fits(tokens, expected):
        counts = np.bincount(tokens, minlength=V)
        rare = expected * len(tokens) < 5
        expected, seen = (np.append(x[~rare], x[rare].sum()) for x in (expected * len(tokens), counts))
        return scipy.stats.chisquare(seen, expected).pvalue > 1e-5

    assert fits(first, p[9])
    likeliest = draft[0, 0]
    assert fits(second[taken & (first == likeliest)], p[likeliest])
    # What is drawn where the draft is refused follows p without the draft.
    rest = p[9] * (np.arange(V) != likeliest)
    assert fits(first[(draft[:, 0] == likeliest) & ~taken], rest / rest.sum())


def test_masks_along_a_draft():
    """A grammar's mask is given for every place of the draft."""
    newest, draft = np.array([1] * 4), np.full((4, T - 1), 8)
    mask = np.zeros((4, T, 2), np.uint32)
    for t, id in enumerate((8, 8, 33, 39)):
        mask[:, t, id // 32] = 1 << id % 32
    given = Extras(RowExtras.repeat(Sampling(), 4), jnp.zeros((4, V), jnp.int32), jnp.asarray(mask))
    count, sampled = agreed(LOGITS[np.concatenate([newest[:, None], draft], axis=1)], draft, rows(), np.zeros(4, np.int32), given)
    assert count.tolist() == [3] * 4
    assert sampled.token_B.tolist() == [[8, 8, 33, 39]] * 4
