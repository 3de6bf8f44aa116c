"""A model as Tunix calls it, and Tunix's own trainer on it where that is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maverick_jax.errors import UserError
from maverick_jax.model.low_rank import adapters, add_adapters
from maverick_jax.training.tunix import ForTunix
from oracle.plain import plain_model

IDS = np.random.default_rng(0).integers(5, 50, (2, 14)).astype(np.int32)


def causal(real_BT):
    T = real_BT.shape[1]
    return real_BT[:, None, :] & jnp.tril(jnp.ones((1, T, T), bool))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side):
    """The logits of real tokens are those of the rows alone."""
    model = plain_model()
    real = np.ones(IDS.shape, bool)
    real[1, slice(0, 5) if side == "left" else slice(9, None)] = False
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    logits, cache = ForTunix(model)(jnp.asarray(IDS), jnp.asarray(positions), None, jnp.asarray(causal(real)))
    assert cache is None
    for row in range(2):
        np.testing.assert_allclose(logits[row][real[row]], model(IDS[row][real[row]][None])[0], atol=1e-4)
    np.testing.assert_allclose(ForTunix(model)(IDS, positions)[0], model(IDS), atol=1e-4)


def test_what_it_does_not_take():
    made = ForTunix(plain_model())
    with pytest.raises(UserError, match=r"not a cache: draw answers with maverick_jax\.Engine"):
        made(IDS, IDS, {}, None)
    with pytest.raises(UserError, match="not images"):
        made(IDS, IDS, None, None, images=np.zeros(3))


@pytest.mark.filterwarnings("ignore")
def test_in_tunix(monkeypatch):
    """Tunix's trainer learns the adapters, and nothing else."""
    trainers = pytest.importorskip("tunix.sft.peft_trainer", reason="Tunix is not installed: pip install google-tunix")
    model = plain_model()
    add_adapters(model, {"attention": 2, "experts": 2})
    before = np.asarray(model.text.embedding[...])
    config = trainers.TrainingConfig(eval_every_n_steps=100, max_steps=8)
    trainer = trainers.PeftTrainer(ForTunix(model), optax.adam(3e-2), config)

    def inputs(batch):
        mask = jnp.asarray(batch.input_mask) > 0
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": jnp.cumsum(mask, axis=1) - 1,
            "attention_mask": causal(mask),
        }

    batch = trainers.TrainingInput(input_tokens=IDS, input_mask=np.ones(IDS.shape, np.float32))
    trainer = trainer.with_gen_model_input_fn(inputs)
    first = loss(model)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        trainer.train([batch] * 8)
    assert loss(model) < 0.9 * first
    np.testing.assert_array_equal(model.text.embedding[...], before)
    assert any(np.asarray(adapter.b[...]).any() for adapter in adapters(model).values())


def loss(model) -> float:
    return float(optax.softmax_cross_entropy_with_integer_labels(model(IDS)[:, :-1], IDS[:, 1:]).mean())
