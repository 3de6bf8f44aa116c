"""Meta's `params.json`: widths are derived, and defaults are not Hugging Face's."""

import dataclasses

import pytest

from maverick_jax.config import Config
from oracle.release_files import META


@pytest.mark.parametrize("nested", [False, True])
def test_meta_params_of_maverick(nested):
    """Widths are derived (16384 dense, 8192 expert), and temperature is off unless asked for, unlike in Hugging Face's files."""
    values = META | dict(moe_args=dict(num_experts=128, capacity_factor=1.0, auto_scale_F=True, top_k=1, interleave_moe_layer_step=2))
    config = Config.from_meta({"model": values} if nested else values)
    expected = Config.maverick()
    assert config == dataclasses.replace(expected, text=dataclasses.replace(expected.text, attn_temperature_tuning=False))


def test_meta_params_of_scout():
    """`use_scaled_rope` means factor 16 and equal bands, the released values, not those of the first code (8, 1, 4)."""
    values = META | dict(
        moe_args=dict(num_experts=16, capacity_factor=1.0, auto_scale_F=True, top_k=1, interleave_moe_layer_step=1),
        use_scaled_rope=True,
        use_qk_norm=True,
        attn_temperature_tuning=True,
        max_seq_len=10485760,
    )
    assert Config.from_meta(values) == Config.scout()
