"""Configurations: the releases' sizes, and every spelling in which their files describe them."""

import dataclasses
import json
import math

import jax
import pytest
from flax import nnx
from transformers import AutoConfig, Llama4TextConfig, Llama4VisionConfig

from maverick_jax.config import Config, huggingface
from maverick_jax.errors import UserError
from maverick_jax.model import get_abstract_model
from oracle.release_files import release

PRESETS = {"maverick": Config.maverick(), "scout": Config.scout()}


@pytest.mark.parametrize("preset, parameters, tensors", [("maverick", 401_583_781_376, 1061 + 24), ("scout", 108_641_793_536, 1133 + 48)])
def test_presets_have_the_releases_size(preset, parameters, tensors):
    """Scout's count is published, Maverick's follows; tensors are the releases' plus one per fused gate/up stack."""
    leaves = jax.tree.leaves(nnx.state(get_abstract_model(PRESETS[preset])))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters
    assert len(leaves) == tensors


@pytest.mark.parametrize("variant", ["maverick", "scout"])
def test_release_files_read_as_the_presets(variant):
    """A field of the release is read wrongly, taken for unknown, or the preset is not the release."""
    assert Config.from_huggingface(release(variant)) == PRESETS[variant]


@pytest.mark.parametrize("variant", ["maverick", "scout"])
def test_both_spellings_of_rope_and_dtype_are_equal(variant):
    """transformers 5.x writes `rope_parameters` and `dtype` for what 4.51 called `rope_scaling`, `rope_theta` and `torch_dtype`."""
    values = release(variant)
    text = values["text_config"]
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), **(text.pop("rope_scaling") or {"rope_type": "default"})}
    text["dtype"], values["dtype"] = text.pop("torch_dtype"), values.pop("torch_dtype")
    values["vision_config"]["rope_parameters"] = {"rope_theta": values["vision_config"].pop("rope_theta"), "rope_type": "default"}
    assert Config.from_huggingface(values) == PRESETS[variant]


@pytest.mark.parametrize("spelling", [[], None, "absent", "explicit"])
def test_nope_layers(spelling):
    """In `no_rope_layers` a 1 means "uses RoPE", against its name; absent, null and [] all mean every fourth layer without."""
    values = release(no_rope_layers=[int((i + 1) % 4 != 0) for i in range(48)] if spelling == "explicit" else spelling)
    if spelling == "absent":
        del values["text_config"]["no_rope_layers"]
    assert Config.from_huggingface(values).text.nope_layers == tuple(range(3, 48, 4))


def test_an_explicit_list_of_nope_layers_wins():
    """A fine-tune's own pattern must not be replaced by the interval of four."""
    assert Config.from_huggingface(release(no_rope_layers=[1] * 46 + [0, 1])).text.nope_layers == (46,)


def test_a_short_list_of_nope_layers_is_refused():
    """Which layers the missing entries mean cannot be guessed."""
    with pytest.raises(UserError, match="no_rope_layers has 3 entries for 48 layers"):
        Config.from_huggingface(release(no_rope_layers=[1, 1, 0]))


@pytest.mark.parametrize("value, expected", [(True, True), (False, False), (4, True), (None, True)])
def test_temperature_switch(value, expected):
    """Mirrors write the integer 4 for true; absent means on (Meta's own files: off)."""
    assert Config.from_huggingface(release(attn_temperature_tuning=value)).text.attn_temperature_tuning is expected


def test_chunk_null_is_full_attention_and_absent_is_the_default():
    """Llama Guard 4 attends fully on every layer; null must not become 8192."""
    assert Config.from_huggingface(release(attention_chunk_size=None)).text.attention_chunk_size is None
    values = release()
    del values["text_config"]["attention_chunk_size"]
    assert Config.from_huggingface(values).text.attention_chunk_size == 8192


@pytest.mark.parametrize("listed, expected", [([], ()), ([1, 5], (1, 5)), (None, tuple(range(1, 48, 2)))])
def test_moe_layers_override_the_step(listed, expected):
    """An empty list is a dense model (Llama Guard 4), not "use the step"."""
    assert Config.from_huggingface(release(moe_layers=listed)).text.moe_layers == expected


def test_flat_text_only_files():
    """Text-only fine-tunes have no `text_config`, no vision, and a vocabulary of 201135 or so."""
    flat = {**release(vocab_size=201135)["text_config"], "architectures": ["Llama4ForCausalLM"]}
    config = Config.from_huggingface(flat)
    assert config.vision is None
    assert config.text == dataclasses.replace(Config.maverick().text, vocab_size=201135)


def test_special_ids_of_the_text_part_win():
    """A fine-tune writes its own there and leaves those on top as they were."""
    values = release(bos_token_id=7, eos_token_id=8, pad_token_id=9) | {"bos_token_id": 1, "eos_token_id": [2, 3], "image_token_index": 5}
    config = Config.from_huggingface(values)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.image_token_index) == (7, (8,), 9, 5)
    del values["text_config"]["eos_token_id"]
    assert Config.from_huggingface(values).eos_token_id == (2, 3)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_quantization_of_a_part_is_not_overlooked(part):
    """The converter looks on top alone: FP8 numbers would be taken for weights."""
    values = release()
    values[part]["quantization_config"] = {"quant_method": "fbgemm_fp8"}
    with pytest.raises(UserError, match=f"unknown field {part}.quantization_config"):
        Config.from_huggingface(values)


@pytest.mark.parametrize("part", ["", "text_config", "vision_config"])
def test_an_unknown_field_that_asks_for_something_is_named(part):
    """It may change the result: passing over it is how ports go wrong."""
    values = release()
    (values[part] if part else values)["logit_soft_cap"] = 30.0
    with pytest.raises(UserError, match=rf"unknown field {part}\.?logit_soft_cap = 30.0"):
        Config.from_huggingface(values)


@pytest.mark.parametrize("part", ["", "text_config", "vision_config"])
@pytest.mark.parametrize("value", [None, False, [], {}])
def test_an_unknown_switch_that_is_off_is_ignored(part, value):
    """Newer transformers add switches; one that is off asks for nothing."""
    values = release()
    (values[part] if part else values)["some_new_switch"] = value
    assert Config.from_huggingface(values) == Config.maverick()


@pytest.mark.parametrize("field, value", [("num_experts_per_tok", 2), ("hidden_act", "gelu"), ("attention_bias", True)])
def test_another_computation_is_refused(field, value):
    """A known field with a value that no Llama 4 has would be computed as if it were not there."""
    with pytest.raises(UserError, match=rf"text_config.{field} is {value!r}"):
        Config.from_huggingface(release(**{field: value}))


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0}, {"rope_type": "llama3", "factor": 16.0}])
def test_rope_scaling_of_another_kind_or_without_its_numbers_is_refused(rope):
    """Unscaled angles would look right on short prompts."""
    with pytest.raises(UserError, match="rope"):
        Config.from_huggingface(release(rope_scaling=rope))


def test_another_model_is_refused():
    """A Llama 3 file has almost the same fields."""
    with pytest.raises(UserError, match="model_type is 'llama'"):
        Config.from_huggingface({**release(), "model_type": "llama"})


@pytest.mark.parametrize("variant", ["maverick", "scout", "text only", "dense"])
def test_written_config_reads_back_and_transformers_reads_it(variant, tmp_path):
    """An exported checkpoint describes the model that it was made from, to us and to transformers."""
    config = PRESETS.get(variant, Config.maverick())
    if variant == "text only":
        config = dataclasses.replace(config, vision=None)
    if variant == "dense":
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, moe_layers=(), nope_layers=(0, 47)))
    assert Config.from_huggingface(config.to_huggingface()) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_huggingface()))
    assert Config.from_directory(tmp_path) == config
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert Config.from_huggingface(theirs.to_dict()) == config


def test_a_base_that_does_not_count_is_told():
    """transformers passes over `rope_theta` beside a dictionary with another one, without a word."""
    values = {"text_config": {"rope_theta": 7, "rope_parameters": {"rope_theta": 5e5}}, "vision_config": {"rope_theta": 9}}
    (told,) = huggingface.overridden(values)
    assert told.startswith("text_config.rope_theta is 7, but rope_parameters says 500000.0")
    assert not huggingface.overridden({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 500000}, "rope_scaling": {}})


def test_what_a_file_leaves_out_is_as_in_transformers():
    """Its defaults, not the releases' sizes, which ours are where Python leaves something out."""
    for defaults, theirs in ((huggingface.TEXT_DEFAULTS, Llama4TextConfig()), (huggingface.VISION_DEFAULTS, Llama4VisionConfig())):
        assert defaults == {name: getattr(theirs, name) for name in defaults}
    assert huggingface.TEXT_DEFAULTS.keys() | {*huggingface.REQUIRED} == {*huggingface.TEXT_SAME}
    assert huggingface.VISION_DEFAULTS.keys() == {*huggingface.VISION_SAME}
