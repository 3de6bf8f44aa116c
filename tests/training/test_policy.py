"""The objective of reinforcement: its loss and gradient by hand, and what it measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maverick_jax.errors import UserError
from maverick_jax.training.batch import Batch
from maverick_jax.training.policy import Drawn, Policy, entropy
from oracle.answers import likely, log_softmax
from oracle.plain import plain_model


def drawn_by(model, seed: int = 0, spread: float = 0.5) -> Drawn:
    """Answers whose sampler saw other probabilities: some ratios are clipped, above and below."""
    random = np.random.default_rng(seed)
    ids = random.integers(5, 50, (4, 12)).astype(np.int32)
    lengths = np.array([12, 9, 12, 7], np.int32)
    weight = ((np.arange(12) >= 3) & (np.arange(12) < lengths[:, None] - 1)).astype(np.float32)
    batch = Batch(ids, lengths, np.roll(ids, -1, axis=1), weight)
    sampled = (likely(model, batch) + spread * random.standard_normal(ids.shape)).astype(np.float32)
    reference = (sampled + 0.3 * random.standard_normal(ids.shape)).astype(np.float32)
    advantage = np.repeat(random.standard_normal((4, 1)), 12, axis=1).astype(np.float32)
    return Drawn(batch, advantage, np.where(weight > 0, sampled, 0), np.where(weight > 0, reference, 0))


def by_hand(logprob, drawn: Drawn, *, below, above, kl):
    """The sum of the tokens' losses, in float64."""
    weight, advantage = (np.asarray(x, np.float64) for x in (drawn.batch.weight_BT, drawn.advantage_BT))
    ratio = np.exp(logprob - drawn.sampled_BT)
    lost = -np.minimum(ratio * advantage, np.clip(ratio, 1 - below, 1 + above) * advantage)
    behind = drawn.reference_BT - logprob
    return (weight * (lost + kl * (np.exp(behind) - behind - 1)))[weight > 0].sum()


@pytest.mark.parametrize("setting", [{}, {"below": 0.1, "above": 0.4}, {"kl": 0.3}], ids=str)
def test_loss_by_hand(setting):
    model = plain_model()
    drawn = drawn_by(model)
    lost, measures = jax.jit(lambda drawn: Policy(**setting)(model, drawn))(drawn)
    logprob, weight = likely(model, drawn.batch), drawn.batch.weight_BT
    settings = {"below": 0.2, "above": 0.28, "kl": 0.0, **setting}
    np.testing.assert_allclose(lost, by_hand(logprob, drawn, **settings), rtol=2e-5)
    np.testing.assert_allclose(measures["disagreement"], (np.abs(logprob - drawn.sampled_BT) * weight).sum(), rtol=1e-5)
    ratio = np.exp(logprob - drawn.sampled_BT)
    outside = (ratio < 1 - settings["below"]) | (ratio > 1 + settings["above"])
    assert measures["clipped"] == (outside * weight).sum() > 0
    assert Policy().total(drawn) == weight.sum()


def test_where_the_gradient_is():
    """None from a ratio that is clipped, in the direction that would move it further; where nothing has moved it is that of
    `-advantage * log p`."""
    model = plain_model()
    drawn = drawn_by(model, spread=0.0)
    hidden_D = jnp.asarray(model.text.norm[...])

    def loss(norm, objective):
        changed = plain_model()
        changed.text.norm[...] = norm
        return objective(changed)

    def plain(changed):
        logits = changed.logits(changed.hidden(changed.embed(drawn.batch.ids_BT), drawn.batch.lengths_B)[0])
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn.batch.target_BT[..., None], axis=-1)[..., 0]
        return -(drawn.batch.weight_BT * drawn.advantage_BT * logprob).sum()

    mine = jax.grad(lambda norm: loss(norm, lambda m: Policy()(m, drawn)[0]))(hidden_D)
    np.testing.assert_allclose(mine, jax.grad(lambda norm: loss(norm, plain))(hidden_D), rtol=1e-3, atol=1e-4)
    far = drawn._replace(sampled_BT=drawn.sampled_BT - 1, advantage_BT=np.ones_like(drawn.advantage_BT))  # all ratios are e
    gone = jax.grad(lambda norm: loss(norm, lambda m: Policy()(m, far)[0]))(hidden_D)
    np.testing.assert_allclose(gone, 0, atol=1e-6)


def test_entropy():
    model = plain_model()
    batch = drawn_by(model).batch
    log = log_softmax(model, batch)
    np.testing.assert_allclose(entropy(jnp.asarray(log, jnp.float32)), -(np.exp(log) * log).sum(axis=-1), rtol=1e-5)


@pytest.mark.parametrize("setting, words", [({"below": 1}, "below is 1"), ({"above": 0}, "above is 0"), ({"kl": -1}, "kl is -1")])
def test_settings_that_mean_nothing(setting, words):
    with pytest.raises(UserError, match=words):
        Policy(**setting)
