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


def test_without_moe_args_there_are_no_experts():
    """Every layer is dense; no default makes mixtures of it."""
    config = Config.from_meta({name: value for name, value in META.items() if name != "vision_args"} | {"moe_args": None})
    assert (config.text.moe_layers, config.text.num_local_experts, config.vision) == ((), 0, None)


@pytest.mark.parametrize(("switch", "on"), [(True, True), (4, True), (0, False), (None, False)])
def test_temperature_is_off_unless_asked_for(switch, on):
    """Unlike in Hugging Face's files; the integer 4 of some is as good as true."""
    assert Config.from_meta(META | {"attn_temperature_tuning": switch, "floor_scale": 8192.0}).text.attn_temperature_tuning is on
