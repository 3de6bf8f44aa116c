"""What no model has is refused by one line: the file, the field as it is spelled there, its value, and what it must be."""

import dataclasses
import json
import tracemalloc
from typing import Any

import pytest

from maverick_jax.config import Config, RopeScaling, TextConfig, VisionConfig, checks, huggingface, meta
from maverick_jax.errors import UserError
from oracle.config_spellings import ABSENT, FLAT, LLAMA3, NESTED, write
from oracle.release_files import META

NAN, INFINITE = float("nan"), float("inf")
NO_COUNT = [0, -1, 32.0, "32", [32], {}, True, NAN, INFINITE, 10**10, 10**400]
NO_NUMBER = [0, -1, -1e-9, "1e-5", [1e-5], True, NAN, INFINITE, 10**400, 1e300]
NO_FLAG = [0, 1, 1.0, "true", [True]]
NO_ID = ["<|eot|>", 1.5, True, [2], NAN, 2**31, -2]
VALUES: dict[str, list[Any]] = {  # field of a flat file -> values that it cannot have
    **dict.fromkeys("vocab_size hidden_size intermediate_size intermediate_size_mlp num_hidden_layers".split(), NO_COUNT),
    **dict.fromkeys("num_attention_heads num_key_value_heads max_position_embeddings".split(), NO_COUNT),
    "head_dim": [7, *NO_COUNT],
    "num_local_experts": NO_COUNT[1:],
    "num_experts_per_tok": NO_COUNT[1:],
    "interleave_moe_layer_step": [-2, 1.0, "2", True],
    "moe_layers": [["1"], [1.0, 3.0], [True], [-1], [10**9], [[1]], [None], 1, "1", {"1": 1}],
    "no_rope_layers": [["1"] * 4, [True] * 4, [0, 1, 2, 3], [1.0] * 4, [None] * 4, 4, "1110", {"0": 1}],
    "no_rope_layer_interval": [0, -4, 4.0, "4", True],
    "layer_types": [["sliding_attention"] * 4, [1] * 4, [None] * 4, "full_attention", 4],
    "attention_chunk_size": [0, -5, 8.0, "8", [8], True, False, NAN, 2**31],
    "floor_scale": [0, -1, 4.5, "4", [4], True, NAN, INFINITE],
    "attn_scale": ["0.1", -0.1, [0.1], True, NAN, INFINITE],
    "rms_norm_eps": NO_NUMBER,
    "rope_theta": NO_NUMBER,
    "use_qk_norm": NO_FLAG,
    "tie_word_embeddings": NO_FLAG,
    "attn_temperature_tuning": ["true", 4.0, [True], NAN],
    "torch_dtype": ["auto", "int7", "float64", "bf16", ["bfloat16"], 16, True, {}],
    "dtype": ["auto", "int7", ""],
    "eos_token_id": [["<|eot|>"], [[2]], [2, None], [2.0], [True], {}, *NO_ID[:3], *NO_ID[4:]],
    "bos_token_id": NO_ID,
    "pad_token_id": NO_ID,
    "image_token_index": ["x", -1, 1.5, True, 2**31],
    "rope_scaling": ["llama3", 4, [LLAMA3], True],
    "rope_parameters": ["default", [{}]],
}
INSIDE: dict[str, list[Any]] = {  # the same, of a nested file
    "text_config.hidden_size": NO_COUNT,
    "text_config.rms_norm_eps": ["1e-5"],
    "text_config.rope_scaling.factor": NO_NUMBER,
    "text_config.rope_scaling.original_max_position_embeddings": NO_COUNT,
    "text_config.rope_scaling.rope_type": ["yarn", 1, ["llama3"], {}],
    "text_config.rope_scaling.rope_theta": ["1e4", 0],
    "vision_config": ["336", 5, [{}], True],
    **{f"vision_config.{name}": NO_COUNT for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vision_output_dim")},
    "vision_config.image_size": [0, -14, 56.0, "56", True, 10**9],
    "vision_config.pixel_shuffle_ratio": [0, 0.3, -0.5, 2, "0.5", [0.5], True, NAN],
    "vision_config.rope_theta": NO_NUMBER,
    "vision_config.dtype": ["int7"],
    "image_token_id": ["x", -1],
}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # what more than one field decides, and what is missing
    "no hidden_size": (FLAT, {"hidden_size": None}, "hidden_size missing"),
    "no vocab_size": (FLAT, {"vocab_size": ABSENT}, "vocab_size missing"),
    "heads that do not divide": (FLAT, {"num_key_value_heads": 3}, "4 attention heads cannot share 3 key/value heads"),
    "an odd head of its own making": (FLAT, {"head_dim": None, "hidden_size": 28}, "head_dim is 7: it must be an even whole number"),
    "mixtures of no experts": (FLAT, {"num_local_experts": 0}, "layer 1 is a mixture of experts, but there are 0"),
    "two experts": (FLAT, {"num_experts_per_tok": 2}, "num_experts_per_tok is 2; only 1 is supported"),
    "no expert": (FLAT, {"num_experts_per_tok": 0}, "num_experts_per_tok is 0; only 1 is supported"),
    "a mixture beyond the last": (FLAT, {"moe_layers": [1, 4]}, "moe_layers names layer 4; the 4 layers are counted from 0."),
    "RoPE of too few layers": (FLAT, {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 4 layers"),
    "chunks without RoPE": (FLAT, {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layer_types disagrees with"),
    "too few types": (FLAT, {"layer_types": ["full_attention"]}, "layer_types disagrees with no_rope_layers"),
    "no factors": (FLAT, {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor, rope_scaling.low_freq_factor, "),
    "factor null": (FLAT, {"rope_scaling": LLAMA3 | {"factor": None}}, "rope_scaling.factor missing"),
    "factors exchanged": (FLAT, {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor (2.0) is below"),
    "a part of the head": (FLAT, {"rope_scaling": {"partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor = 0.5"),
    "RoPE per type": (FLAT, {"rope_parameters": {"full_attention": {}}}, "unknown field rope_parameters.full_attention"),
    "gelu": (FLAT, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported."),
    "biases": (FLAT, {"attention_bias": True}, "attention_bias is True; only False is supported."),
    "an unknown field": (FLAT, {"final_logit_softcapping": 30.0}, "unknown field final_logit_softcapping = 30.0"),
    "a field of many lines": (FLAT, {"a\nb": "c\nd" * 99}, r"unknown field 'a\nb' = 'c\nd"),
    "nested in a flat file": (FLAT, {"text_config": FLAT}, "unknown field text_config"),
    "another model": (FLAT, {"model_type": "llama"}, "model_type is 'llama', not"),
    "no name of a model": (FLAT, {"model_type": ["llama4"]}, "model_type is ['llama4'], not"),
    "no text_config": (NESTED, {"text_config": ABSENT}, "text_config is missing"),
    "a list for text_config": (NESTED, {"text_config": [FLAT]}, "text_config is missing"),
    "no vision_config": (NESTED, {"vision_config": ABSENT}, "vision_config is missing"),
    "null for vision_config": (NESTED, {"vision_config": None}, "vision_config is missing"),
    "an empty text_config": (NESTED, {"text_config": {}}, "text_config.vocab_size, text_config.hidden_size, "),
    "an empty vision_config": (NESTED, {"vision_config": {}}, "vision intermediate_size must be"),
    "a long image": (NESTED, {"vision_config.image_size": [56, 28]}, "vision_config.image_size is [56, 28]: tiles and"),
    "an image without sides": (NESTED, {"vision_config.image_size": []}, "vision_config.image_size is []: tiles and patches"),
    "sides in words": (NESTED, {"vision_config.patch_size": ["14", "14"]}, "vision_config.patch_size is '14': it must be"),
    "scaled angles of patches": (NESTED, {"vision_config.rope_scaling": LLAMA3}, "vision_config.rope_scaling asks for scaled"),
}


def refusal(tmp_path, values: dict[str, Any], name: str = "config.json") -> str:
    """The line that a file is refused with, without its own name."""
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        Config.from_directory(tmp_path)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < len(str(tmp_path)) + 300
    assert text.startswith(f"{tmp_path / name}: ")
    return text.removeprefix(f"{tmp_path / name}: ")


@pytest.mark.parametrize("field", VALUES)
def test_a_value_that_a_field_cannot_have(field, tmp_path):
    """In a traceback nobody finds the field, and a model with such a value computes something else, or never ends."""
    for value in VALUES[field]:
        assert refusal(tmp_path, write(FLAT, {field: value})).startswith(f"{field} is {checks.show(value)}: it must be ")


@pytest.mark.parametrize("field", INSIDE)
def test_a_value_that_a_field_of_a_part_cannot_have(field, tmp_path):
    base = write(NESTED, {"text_config.rope_scaling": LLAMA3})
    for value in INSIDE[field]:
        assert refusal(tmp_path, write(base, {field: value})).startswith(f"{field} is {checks.show(value)}: it must be ")


@pytest.mark.parametrize("name", OTHERS)
def test_fields_that_disagree_or_are_missing(name, tmp_path):
    base, changes, says = OTHERS[name]
    assert says in refusal(tmp_path, write(base, changes))


def test_a_rule_says_what_is_right(tmp_path):
    """The words, whole, once."""
    assert refusal(tmp_path, write(NESTED, {"text_config.rms_norm_eps": "1e-5"})) == (
        "text_config.rms_norm_eps is '1e-5': it must be a number above 0."
    )
    assert refusal(tmp_path, write(FLAT, {"num_hidden_layers": 10**9})) == (
        "num_hidden_layers is 1000000000: it must be a whole number from 1 to 1,024."
    )


@pytest.mark.parametrize("base", [FLAT, NESTED, META], ids=["flat", "nested", "meta"])
def test_nothing_in_any_field_is_a_traceback(base):
    """A model or one line, whatever stands there."""
    nonsense = [*NO_COUNT, *NO_ID, {}, [], [[]], {"": None}, {"a": [1, {"b": None}]}, [None], "", "\0", 1, 2, 3, -1e308, False, None]
    read = Config.from_meta if base is META else Config.from_huggingface
    tables = [meta.PARAMS, *({f"{part}.{n}" for n in base[part]} for part in base if isinstance(base[part], dict))]
    for field in {*base, *huggingface.TEXT, *huggingface.TOP, *huggingface.NOISE}.union(*tables):
        for value in nonsense:
            try:
                found = read(write(base, {field: value}))
            except UserError:
                continue
            assert isinstance(found, Config)


META_VALUES: dict[str, list[Any]] = {
    **dict.fromkeys(("dim", "n_layers", "n_heads"), NO_COUNT),
    "vocab_size": ["202048", -2, 1.0, True],
    "n_kv_heads": [0, "8", True],
    "head_dim": [127, 0],
    "multiple_of": [0, 0.5],
    "ffn_dim_multiplier": ["1.2", 0, NAN, INFINITE, 1e9],
    "ffn_exp": [-4, [4]],
    "norm_eps": NO_NUMBER,
    "rope_theta": NO_NUMBER,
    "attention_chunk_size": [0, "8192", True],
    "use_scaled_rope": NO_FLAG,
    "nope_layer_interval": [-4, 4.0, "4"],
    "moe_args": [[], "16", 5, True],
    "vision_args": [[], "336", True],
    "model": [[], "llama4", 5],
    "moe_args.num_experts": NO_COUNT[1:],
    "moe_args.capacity_factor": ["1", -1, NAN],
    "moe_args.auto_scale_F": NO_FLAG,
    "moe_args.top_k": [2, 0, "1", True],
    "moe_args.interleave_moe_layer_step": [-1, 2.0],
    "vision_args.dim": NO_COUNT,
    "vision_args.mlp_ratio": ["4", 0, NAN],
    "vision_args.pixel_shuffle_ratio": [0, 0.3],
}
MIXTURES = {"moe_args": {"num_experts": 16}}


@pytest.mark.parametrize("field", META_VALUES)
def test_a_value_that_a_field_of_metas_cannot_have(field, tmp_path):
    for value in META_VALUES[field]:
        text = refusal(tmp_path, write(META | MIXTURES, {field: value}), "params.json")
        assert text.startswith(f"{field} is {checks.show(value)}: it must be ")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dim": ABSENT, "n_layers": None}, "dim, n_layers missing"),
        ({"moe_args.num_experts": None, "moe_args.top_k": 1}, "moe_args.num_experts missing"),
        ({"vision_args.output_dim": ABSENT}, "vision_args.output_dim missing"),
        ({"vision_args.image_size": {"height": 336, "width": 335}}, "vision_args.image_size is {'height': 336, 'width': 335}: tiles"),
        ({"n_kv_heads": 7}, "40 attention heads cannot share 7 key/value heads"),
    ],
)
def test_fields_of_metas_that_disagree_or_are_missing(changes, says, tmp_path):
    assert says in refusal(tmp_path, write(META | MIXTURES, changes), "params.json")


def test_python_is_held_to_the_same_rules():
    """Whoever writes `TextConfig(...)` gets the file's answer, not an error from the middle of a matrix product."""
    whole = Config.scout()
    for part, name, value in [
        (whole.text, "rms_norm_eps", "1e-5"),
        (whole.text, "num_hidden_layers", 10**9),
        (whole.text, "hidden_size", 5120.0),
        (whole.text, "vocab_size", 10**5000),
        (whole.text, "moe_layers", [0, 1]),
        (whole.text, "moe_layers", (1, 0)),
        (whole.text, "nope_layers", (3, 3)),
        (whole.text, "attn_temperature_tuning", 4),
        (whole.text, "rope_scaling", {"factor": 16.0}),
        (whole.text.rope_scaling, "factor", 0),
        (whole.vision, "num_hidden_layers", 0),
        (whole, "eos_token_id", 200001),
        (whole, "dtype", "int7"),
        (whole, "text", {}),
        (whole, "vision", {}),
    ]:
        with pytest.raises(UserError, match=rf"^(vision )?{name} is .*: it must be "):
            dataclasses.replace(part, **{name: value})


@pytest.mark.parametrize("kind", [TextConfig, VisionConfig, RopeScaling, Config])
def test_every_field_has_a_rule(kind):
    """A field that is added without one would take anything."""
    rules = {TextConfig: checks.TEXT, VisionConfig: checks.VISION, RopeScaling: checks.ROPE_SCALING, Config: checks.MODEL}[kind]
    assert {field.name for field in dataclasses.fields(kind)} - {"rope_scaling", "text", "vision"} == rules.keys()


def test_nothing_of_the_size_of_a_count_is_built():
    """A layer is at least an entry of a tuple: a billion of them would fill the memory before anybody says no."""
    tracemalloc.start()
    try:
        for base, name, read in ((FLAT, "num_hidden_layers", huggingface.read), (META, "n_layers", meta.read)):
            with pytest.raises(UserError, match=f"{name} is 1000000000"):
                read(write(base, {name: 10**9}))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
