"""What a row draws follows from its own seed and the number of the draw: not from its place, nor from who stands beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maverick_jax.errors import UserError
from maverick_jax.inference.generate import generate
from maverick_jax.inference.sampling import RowSampling, Sampling, sample
from oracle.forward import logits
from oracle.plain import plain_model

PROMPTS = [[4, 5, 6], [7, 8, 9, 10, 11], [12]]
NEW = 19  # three decode calls
draw = jax.jit(lambda logits, rows, step: sample(logits, rows, step[None]).token_B[0])


@pytest.fixture(scope="module")
def model():
    return plain_model(num_hidden_layers=2)


def sampled(model, prompts, seed) -> list[list[int]]:
    return generate(model, prompts, max_new_tokens=NEW, temperature=1.5, seed=seed, stop_ids=())


def test_draw_by_draw(model):
    """Token n of a row is draw n of its seed on the model's own logits: a number that never advances draws the same each time."""
    for prompt, seed, row in zip(PROMPTS, (3, 5, 3), sampled(model, PROMPTS, [3, 5, 3]), strict=True):
        seen = logits(model, [prompt + row])[0, len(prompt) - 1 :]
        own = RowSampling.repeat(Sampling(temperature=1.5, seed=seed), 1)
        assert row == [int(draw(seen[step : step + 1], own, jnp.int32(step))) for step in range(NEW)]


def test_place_and_company_change_nothing(model):
    """A request alone, in another place or beside others draws the same."""
    rows = sampled(model, PROMPTS, [7, 8, 2**32 - 1])
    a, b, c = rows
    assert sampled(model, PROMPTS[::-1], [2**32 - 1, 8, 7]) == [c, b, a]
    assert sampled(model, [PROMPTS[0]], 7) == [a]


def test_one_seed_for_all(model):
    """Equal prompts of a batch draw their own numbers: row i has seed s + i, modulo 2^32."""
    rows = sampled(model, [PROMPTS[0]] * 3, 2**32 - 2)
    assert len(set(map(tuple, rows))) == 3
    assert rows == sampled(model, [PROMPTS[0]] * 3, [2**32 - 2, 2**32 - 1, 0])
    assert rows != sampled(model, [PROMPTS[0]] * 3, 5)


@pytest.mark.parametrize("seed", [[1, 2], [1, 2, 3, 4], [], np.arange(2)])
def test_as_many_seeds_as_prompts(model, seed):
    """Seeds that run out would be taken for others' rows."""
    with pytest.raises(UserError, match=f"seed has {len(seed)} numbers for 3 prompts: give one per prompt, or a single one"):
        sampled(model, PROMPTS, seed)
