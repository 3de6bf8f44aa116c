"""Routing: the same choice in the form of every platform."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from maverick_jax.model.moe import _highest, _highest_in_one

E = 16


@pytest.mark.parametrize("form", [_highest, _highest_in_one])
def test_padding_goes_nowhere(form):
    """Padding's expert is E; other tokens have their highest score, and of equal ones the first."""
    scores_TE = np.random.default_rng(0).standard_normal((9, E)).astype(np.float32)
    scores_TE[3, [5, 11]] = 9.0
    real_T = np.array([True, False, True, True, True, False, True, True, True])
    highest_T, expert_T = form(jnp.asarray(scores_TE), jnp.asarray(real_T))
    assert expert_T.dtype == jnp.int32
    assert_array_equal(expert_T, np.where(real_T, scores_TE.argmax(axis=1), E))
    assert_array_equal(np.asarray(highest_T)[real_T], scores_TE.max(axis=1)[real_T])
