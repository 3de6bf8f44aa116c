"""The same tokens are left, and the same logits made, as by transformers' processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import generation

from maverick_jax.inference.sampling import Extras, RowExtras, Sampling, history_of
from maverick_jax.inference.sampling.extras import adjust
from oracle.kept import kept

V = 500
LOGITS = np.random.default_rng(8).normal(size=(1, V)).astype(np.float32) * 3
changed = jax.jit(adjust)


@pytest.mark.parametrize(
    "settings",
    [
        dict(top_k=7),
        dict(top_p=0.9),
        dict(min_p=0.05),
        dict(temperature=0.6, top_k=40, top_p=0.8),
        dict(temperature=2.0, top_p=0.99, min_p=0.1),
    ],
    ids=str,
)
def test_what_the_filters_leave(settings):
    """In transformers' order: temperature, top-k, top-p, min-p. The reference of the other tests is right if this is."""
    warpers = generation.LogitsProcessorList()
    for name, warper in (("temperature", "Temperature"), ("top_k", "TopK"), ("top_p", "TopP"), ("min_p", "MinP")):
        if name in settings:
            warpers.append(getattr(generation, f"{warper}LogitsWarper")(settings[name]))
    left = warpers(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(LOGITS.copy()))[0]
    must, may = kept(LOGITS[0], **settings)
    assert set(must) <= set(torch.isfinite(left).nonzero()[:, 0].tolist()) <= set(may)


def test_logits_with_bias_and_repetition_penalty():
    """The bias first, and the penalty on what it makes, for tokens of prompt and answer alike; stop tokens not yet."""
    prompt, new, bias, stop_ids = [3, 9, 9], [44, 3], {9: 4.0, 44: -2.0, 100: 1.5}, [17, 18]
    one = Sampling(repetition_penalty=1.4, logit_bias=bias, min_tokens=3)
    processors = generation.LogitsProcessorList(
        [
            generation.SequenceBiasLogitsProcessor([[[id], value] for id, value in bias.items()]),
            generation.RepetitionPenaltyLogitsProcessor(1.4),
            generation.MinNewTokensLengthLogitsProcessor(len(prompt), 3, stop_ids, device="cpu"),
        ]
    )
    expected = processors(torch.tensor([prompt + new]), torch.from_numpy(LOGITS.copy()))
    given = Extras(RowExtras.repeat(one, 1, stop_ids), jnp.asarray(history_of(prompt, new, V))[None])
    np.testing.assert_allclose(changed(LOGITS, jnp.array([len(new)]), given), expected, rtol=1e-6)
