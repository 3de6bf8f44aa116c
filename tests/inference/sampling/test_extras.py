"""Penalties, biases, masks, minimum tokens and log-probabilities, against float64 and their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maverick_jax.inference.sampling import NOT_FINITE, NOTHING_LEFT, Extras, RowExtras, RowSampling, Sampling, history_of, record, sample
from maverick_jax.inference.sampling.extras import adjust

V = 100  # no multiple of 32: the last word of a mask is not full
B = 4
LOGITS = np.random.default_rng(1).normal(size=(B, V)).astype(np.float32) * 3
PROMPT, NEW = [3, 4, 4, 50], [7, 4, 7, 7, 99]
changed = jax.jit(adjust)
choose = jax.jit(sample)


def extras(*settings: Sampling, prompt=PROMPT, new=NEW, stop_ids=(), allowed=()) -> Extras:
    """Of four rows, the last of which want nothing; `allowed` tokens per row, or all."""
    settings = (*settings, *[Sampling()] * (B - len(settings)))
    rows = jax.tree.map(lambda *x: np.concatenate(x), *(RowExtras.repeat(one, 1, stop_ids) for one in settings))
    mask = np.stack([words(ids) for ids in allowed or [range(V)] * B])
    return Extras(rows, jnp.asarray([history_of(prompt, new, V)] * B), jnp.asarray(mask))


def chosen(given: Extras | None, step=0, logits=LOGITS, **settings):
    found = choose(jnp.asarray(logits), RowSampling.repeat(Sampling(**settings), B), jnp.full(B, step, jnp.int32), given)
    return jax.tree.map(np.asarray, found)


def words(allowed) -> np.ndarray:
    """[W] uint32: bit i of word j is token 32 * j + i."""
    packed = np.zeros(-(-V // 32), np.uint32)
    for id in allowed:
        packed[id // 32] |= np.uint32(1 << id % 32)
    return packed


def test_penalties_follow_their_definitions():
    """The repetition penalty counts the prompt, the other two count the answer alone: one once, one for each time."""
    one = Sampling(repetition_penalty=1.7, presence_penalty=0.9, frequency_penalty=-0.4, logit_bias={4: 2.5, 60: -100, 99: 1})
    expected = LOGITS.astype(np.float64)
    for id, bias in ((4, 2.5), (60, -100), (99, 1)):
        expected[0, id] += bias
    for id in {*PROMPT, *NEW}:
        expected[0, id] *= 1 / 1.7 if expected[0, id] > 0 else 1.7
    for id, times in ((7, 3), (4, 1), (99, 1)):
        expected[0, id] -= 0.9 + times * -0.4
    found = changed(LOGITS, jnp.zeros(B, jnp.int32), extras(one))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
    assert (found[1:] == LOGITS[1:]).all(), "a row without settings is left as it is"


def test_the_history_on_the_device_is_that_of_the_host():
    """Token by token, in one slot of several; what has no token (a stopped row) or no slot (padding) changes nothing."""
    histories = jnp.zeros((4, V), jnp.int32).at[2].set(history_of(PROMPT, [], V))
    for id in NEW:
        histories = record(histories, jnp.array([2, 4, 0]), jnp.array([id, 5, -1]))
    assert histories[2].tolist() == history_of(PROMPT, NEW, V).tolist()
    assert not histories[jnp.array([0, 1, 3])].any()


def test_a_token_that_comes_again_and_again():
    """Without a penalty the most likely token repeats; with one each step sees what the step before has drawn."""
    one, drawn = extras(Sampling(frequency_penalty=2.0), prompt=[], new=[]), []
    for step in range(6):
        token = chosen(one, step).token_B
        one = one._replace(history_BV=record(one.history_BV, jnp.arange(B), jnp.asarray(token)))
        drawn.append(token.tolist())
    left, expected = LOGITS[0].astype(np.float64), []
    for _ in range(6):
        expected.append(int(left.argmax()))
        left[expected[-1]] -= 2.0
    first, *others = zip(*drawn, strict=True)
    assert list(first) == expected
    assert [len(set(row)) > 1 for row in (first, *others)] == [True, False, False, False]


def test_no_stop_token_before_its_time():
    """`min_tokens` keeps away every stop token and no other, until so many tokens are drawn."""
    best = [int(id) for id in np.argsort(-LOGITS[0])[:3]]
    one = extras(Sampling(min_tokens=4), stop_ids=best[:2])
    logits = np.stack([LOGITS[0]] * B)
    drawn = [chosen(one, step, logits).token_B[:2].tolist() for step in (0, 3, 4)]
    assert drawn == [[best[2], best[0]], [best[2], best[0]], [best[0]] * 2]


@pytest.mark.parametrize("settings", [dict(), dict(top_k=5), dict(top_p=0.9), dict(min_p=0.01)], ids=str)
def test_a_mask_leaves_what_it_allows(settings):
    """One token, a few, and none at all, which is told apart; in every way of drawing."""
    allowed = [[99], [2, 31, 32, 64, 99], [], range(V)]
    given, logits = extras(allowed=allowed), np.stack([LOGITS[0]] * B)
    one, few, none, every = zip(*(chosen(given, step, logits, temperature=3.0, **settings).token_B for step in range(100)), strict=True)
    assert set(one) == {99}
    assert set(none) == {NOTHING_LEFT}
    assert 1 < len(set(few) & set(allowed[1])) == len(set(few))
    assert len(set(every) - set(allowed[1])) > 1


def test_log_probabilities_are_the_model_s_own():
    """Before penalties, biases and temperature; of the token that was drawn though it is not the most likely one."""
    found = chosen(extras(Sampling(logprobs=3, logit_bias={5: 100})))
    exact = LOGITS.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    best = np.argsort(-exact, axis=1)[:, :20]
    assert found.token_B.tolist() == [5, *best[1:, 0]]
    np.testing.assert_allclose(found.logprob_B, exact[range(B), found.token_B], atol=1e-5)
    assert (found.top_ids_BN == best).all()
    np.testing.assert_allclose(found.top_logprobs_BN, np.take_along_axis(exact, best, 1), atol=1e-5)
    nobody_asks = chosen(extras())
    assert not any(x.any() for x in nobody_asks[1:]), "then none are computed"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("with_extras", [False, True], ids=["plain", "extras"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_finite(value, with_extras, temperature):
    """One such logit, in whatever place, forbidden or not, spoils its row and no other."""
    logits = LOGITS.copy()
    logits[[0, 2], [0, V - 1]] = value
    token = chosen(extras(allowed=[range(1, V - 1)] * B) if with_extras else None, 0, logits, temperature=temperature).token_B
    assert (token == NOT_FINITE).tolist() == [True, False, True, False]
    assert min(token[1], token[3]) >= 0
