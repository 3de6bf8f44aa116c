"""Read Hugging Face `config.json`, in any spelling that transformers has had, and write it in the newest.

The tables below say what happens to every field. A field that is in none of them and asks for something is an
error: guessing that it does not matter is how ports go wrong. null is as good as absent, but for `attention_chunk_size`.
Sources: spec section 1.1, transformers' `configuration_llama4.py` and `modeling_rope_utils.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from maverick_jax.config import checks
from maverick_jax.config.checks import Rule, list_of, one_of, show, spell, without_null
from maverick_jax.config.parts import NOPE_INTERVAL, RopeScaling, TextConfig, VisionConfig
from maverick_jax.errors import UserError

TEXT_SAME = (  # same name and meaning in the file and in TextConfig
    "vocab_size hidden_size intermediate_size intermediate_size_mlp num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim num_local_experts attention_chunk_size use_qk_norm floor_scale attn_scale "
    "rms_norm_eps max_position_embeddings tie_word_embeddings"
).split()
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
TEXT_DEFAULTS: dict[str, Any] = dict(  # transformers', for files that leave a field out
    intermediate_size=8192,
    intermediate_size_mlp=16384,
    num_key_value_heads=8,
    head_dim=128,
    num_local_experts=16,
    attention_chunk_size=8192,
    use_qk_norm=True,
    floor_scale=8192,
    attn_scale=0.1,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
VISION_SAME = (
    "image_size patch_size num_channels hidden_size intermediate_size num_hidden_layers num_attention_heads projector_input_dim "
    "projector_output_dim vision_output_dim pixel_shuffle_ratio"
).split()
VISION_DEFAULTS: dict[str, Any] = dict(  # transformers', which are not the releases'
    image_size=448,
    patch_size=14,
    num_channels=3,
    hidden_size=768,
    intermediate_size=5632,
    num_hidden_layers=34,
    num_attention_heads=16,
    projector_input_dim=4096,
    projector_output_dim=4096,
    vision_output_dim=7680,
    pixel_shuffle_ratio=0.5,
)
DTYPE = Rule(checks.DTYPE.words, lambda value: isinstance(value, str) and checks.DTYPE.holds(value.removeprefix("torch.")))
DTYPES = {"dtype": DTYPE, "torch_dtype": DTYPE}
IDS = {"bos_token_id": checks.NO_OR_TOKEN_ID, "eos_token_id": checks.STOP_IDS, "pad_token_id": checks.NO_OR_TOKEN_ID}
ROPE_INSIDE = {
    **checks.ROPE_SCALING,
    "rope_theta": checks.POSITIVE,
    "rope_type": one_of("default", "llama3"),
    "type": one_of("default", "llama3"),
}
ROPE = {"rope_theta": checks.POSITIVE, "rope_scaling": checks.OBJECT, "rope_parameters": checks.OBJECT}
ON_TOP = {
    "image_token_index": checks.TOKEN_ID,
    "image_token_id": checks.TOKEN_ID,
    "quantization_config": Rule("what the converter reads", lambda _: True),
}
TOP = {
    **DTYPES,
    **IDS,
    **ON_TOP,
    "vision_config": checks.OBJECT,
    "text_config": checks.OBJECT,
    "tie_word_embeddings": checks.FLAG,  # transformers reads the text part's alone
}
TEXT = {
    **{name: checks.TEXT[name] for name in TEXT_SAME},
    **DTYPES,
    **IDS,
    **ROPE,
    "floor_scale": checks.TOKENS_AS_FLOAT,
    "attn_temperature_tuning": checks.SWITCH,  # some mirrors write the integer 4
    "num_experts_per_tok": checks.EXPERTS,
    "moe_layers": list_of(checks.LAYER),
    "interleave_moe_layer_step": checks.STEP,
    "no_rope_layers": list_of(checks.whole(0, 1)),
    "no_rope_layer_interval": checks.TOKENS,
    "layer_types": list_of(checks.LAYER_TYPE),
}
VISION = {**{name: checks.VISION[name] for name in VISION_SAME}, **DTYPES, **ROPE}
TEXT_ONLY_VALUE = {"hidden_act": "silu", "attention_bias": False}  # other values ask for what no Llama 4 computes
VISION_ONLY_VALUE = {"hidden_act": "gelu"}

# Written into config files, of no effect on logits: training-time terms, generation defaults, bookkeeping.
NOISE = set(
    "architectures model_type transformers_version initializer_range use_cache output_router_logits router_aux_loss_coef "
    "router_jitter_noise attention_dropout projector_dropout cache_implementation for_llm_compressor norm_eps "
    "multi_modal_projector_bias vision_feature_layer vision_feature_select_strategy boi_token_index eoi_token_index "
    "boi_token_id eoi_token_id pretraining_tp attn_implementation return_dict output_attentions output_hidden_states "
    "torchscript chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size "
    "tie_encoder_decoder pruned_heads finetuning_task id2label label2id num_labels problem_type task_specific_params "
    "tokenizer_class prefix sep_token_id decoder_start_token_id max_length min_length do_sample early_stopping num_beams "
    "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values begin_suppress_tokens "
    "suppress_tokens exponential_decay_length_penalty use_bfloat16 tf_legacy_loss name_or_path auto_map unsloth_version "
    "unsloth_fixed base_model_tp_plan base_model_pp_plan".split()
)


def read(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of the `Config` that a `config.json` describes: nested (text and vision) or flat (text-only fine-tunes).

    Raises:
      UserError: another model family, an unknown field that asks for something, a value that no model has, or values that disagree.
    """
    model_type, prefix, written = values.get("model_type"), "", values
    if model_type == "llama4":
        prefix, written = "text_config.", values.get("text_config")
        if not isinstance(written, dict):
            raise UserError("text_config is missing: a config.json with model_type 'llama4' needs one.")
        top = _checked("", values, TOP, {})
        if "vision_config" not in top:  # transformers would make a tower, of sizes that no checkpoint has
            raise UserError("vision_config is missing: a model without pictures has model_type 'llama4_text' and no text_config.")
        text = _checked(prefix, written, TEXT, TEXT_ONLY_VALUE)
    elif model_type == "llama4_text":
        top = text = _checked("", values, TEXT | ON_TOP, TEXT_ONLY_VALUE)
    else:
        raise UserError(f"model_type is {show(model_type)}, not 'llama4' or 'llama4_text': this is not a Llama 4 checkpoint.")
    found: dict[str, Any] = {"text": _read_text(prefix, text, written)}
    if model_type == "llama4":
        found["vision"] = _read_vision("vision_config.", top["vision_config"])
    found |= {name: value for name, value in {**top, **text}.items() if name in IDS}
    if "eos_token_id" in found:
        found["eos_token_id"] = read_stop_ids(found["eos_token_id"])
    for name in ("image_token_index", "image_token_id"):  # the newer name wins
        if name in top:
            found["image_token_index"] = top[name]
    dtypes = [part[name] for part in (top, text) for name in DTYPES if name in part]
    return found | {"dtype": (*dtypes, "bfloat16")[0].removeprefix("torch.")}


def overridden(values: dict[str, Any]) -> list[str]:
    """A sentence for every RoPE base in a `config.json` that another one beside it outvotes, as it does in transformers."""
    found = []
    for prefix, part in (("", values), *((f"{name}.", values.get(name) or {}) for name in ("text_config", "vision_config"))):
        name = "rope_scaling" if part.get("rope_scaling") else "rope_parameters"
        beside, inside = part.get("rope_theta"), (part.get(name) or {}).get("rope_theta")
        if beside is not None and inside is not None and beside != inside:
            found.append(f"{prefix}rope_theta is {show(beside)}, but {name} says {show(inside)}, which counts, as in transformers.")
    return found


def read_stop_ids(value: Any) -> tuple[int, ...]:
    """Of `config.json` or `generation_config.json`: one id or a list."""
    checks.check({"eos_token_id": value}, IDS)
    return tuple(value) if isinstance(value, list) else (value,)


def _checked(prefix: str, values: dict[str, Any], rules: dict[str, Rule], only_value: dict[str, Any]) -> dict[str, Any]:
    """The fields of one part that say something, all of them known and as their rules ask."""
    given = without_null(values)
    for name, value in given.items():
        if name in only_value:
            if value != only_value[name]:
                raise UserError(f"{prefix}{name} is {show(value)}; only {only_value[name]!r} is supported.")
        elif name in rules or name in NOISE or name.startswith("_"):
            continue
        elif value is not False and value not in ([], {}):  # an unknown switch that is off asks for nothing
            raise UserError(
                f"unknown field {prefix}{spell(name)} = {show(value)}: it may change the result. "
                "Remove it from config.json if it does not matter."
            )
    checks.check(given, rules, prefix)
    return given


def _read_text(prefix: str, given: dict[str, Any], written: dict[str, Any]) -> TextConfig:
    """`written` is what `given` was before its nulls were taken out."""
    checks.require(given, REQUIRED, prefix)
    same: dict[str, Any] = {name: given.get(name, TEXT_DEFAULTS.get(name)) for name in TEXT_SAME} | {
        "floor_scale": int(given.get("floor_scale", 8192))
    }
    # Null is "as the others say" for these two, which have another value where they are absent.
    if "num_key_value_heads" in written and "num_key_value_heads" not in given:
        same["num_key_value_heads"] = given["num_attention_heads"]
    if "head_dim" in written and "head_dim" not in given:
        same["head_dim"] = given["hidden_size"] // given["num_attention_heads"]
    layers, moe_layers, nope_layers = given["num_hidden_layers"], _moe_layers(given), _nope_layers(given)
    if moe_layers and given.get("num_experts_per_tok", 1) != 1:
        raise UserError(f"{prefix}num_experts_per_tok is {given['num_experts_per_tok']}; only 1 is supported.")
    if "attention_chunk_size" in written and "attention_chunk_size" not in given:
        same["attention_chunk_size"] = None  # full attention (Llama Guard 4)
    elif kinds := given.get("layer_types"):
        chunked = [kind == "chunked_attention" for kind in kinds]
        if not any(chunked) and len(chunked) == layers:
            same["attention_chunk_size"] = None
        elif chunked != [i not in nope_layers for i in range(layers)]:
            raise UserError(
                f"{prefix}layer_types disagrees with no_rope_layers: chunked_attention belongs to the layers with RoPE and to no others."
            )
    theta, scaling = _read_rope(prefix, given, default_theta=500000.0)
    return TextConfig(
        **same,
        nope_layers=nope_layers,
        moe_layers=moe_layers,
        attn_temperature_tuning=bool(given.get("attn_temperature_tuning", True)),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _nope_layers(given: dict[str, Any]) -> tuple[int, ...]:
    """Layers without RoPE. In the file's list a 1 means "uses RoPE", against its name; absent or `[]` means every fourth."""
    uses_rope, layers = given.get("no_rope_layers"), given["num_hidden_layers"]
    if not uses_rope:
        interval = given.get("no_rope_layer_interval", NOPE_INTERVAL)
        return tuple(range(interval - 1, layers, interval))
    if len(uses_rope) < layers:
        raise UserError(f"no_rope_layers has {len(uses_rope)} entries for {layers} layers: give one per layer (1: RoPE, 0: none) or [].")
    return tuple(i for i in range(layers) if not uses_rope[i])


def _moe_layers(given: dict[str, Any]) -> tuple[int, ...]:
    """Layers with experts: those that are listed, else every so many; a step of 0 is none."""
    step = given.get("interleave_moe_layer_step", 1)
    stepped = range(step - 1, given["num_hidden_layers"], step) if step else ()
    return tuple(sorted(set(given.get("moe_layers", stepped))))


def _read_rope(prefix: str, given: dict[str, Any], default_theta: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_parameters` (5.x) or from `rope_theta` and `rope_scaling` (4.51).

    Of both dictionaries transformers reads `rope_scaling`; a base inside wins over the one beside.
    """
    name = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"
    inside = without_null(given.get(name, {}))
    prefix = f"{prefix}{name}."
    if unknown := [field for field in inside if field not in ROPE_INSIDE]:
        raise UserError(f"unknown field {prefix}{spell(unknown[0])} = {show(inside[unknown[0]])}: it may change the result.")
    checks.check(inside, ROPE_INSIDE, prefix)
    theta = float(inside.get("rope_theta", given.get("rope_theta", default_theta)))
    if inside.get("rope_type", inside.get("type", "default")) == "default":
        return theta, None
    scaling = {"original_max_position_embeddings": given.get("max_position_embeddings"), **inside}
    checks.require(without_null(scaling), checks.ROPE_SCALING, prefix)
    return theta, RopeScaling(**{field: scaling[field] for field in checks.ROPE_SCALING})


def _read_vision(prefix: str, values: dict[str, Any]) -> VisionConfig:
    sides = {name: checks.square(f"{prefix}{name}", values[name]) for name in ("image_size", "patch_size") if name in values}
    given = _checked(prefix, values | sides, VISION, VISION_ONLY_VALUE)
    theta, scaling = _read_rope(prefix, given, default_theta=10000.0)
    if scaling is not None:
        raise UserError(f"{prefix}rope_scaling asks for scaled angles: the vision tower has none.")
    return VisionConfig(**{name: given.get(name, VISION_DEFAULTS[name]) for name in VISION_SAME}, rope_theta=theta)


def write(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` (transformers 5.x spelling) of a `Config` with these fields: what `read` reads back to the same."""
    text, vision = fields["text"], fields["vision"]
    rope: dict[str, Any] = {"rope_theta": text.rope_theta, "rope_type": "default"}
    if text.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(text.rope_scaling)}
    text_values = {name: getattr(text, name) for name in TEXT_SAME} | {
        "model_type": "llama4_text",
        "hidden_act": "silu",
        "num_experts_per_tok": 1,
        "attention_bias": False,
        "attn_temperature_tuning": text.attn_temperature_tuning,
        "moe_layers": list(text.moe_layers),
        "no_rope_layers": [int(i not in text.nope_layers) for i in range(text.num_hidden_layers)],
        "rope_parameters": rope,
        "bos_token_id": fields["bos_token_id"],
        "eos_token_id": list(fields["eos_token_id"]),
        "pad_token_id": fields["pad_token_id"],
        "dtype": fields["dtype"],
    }
    if text.attention_chunk_size is None:  # transformers takes no null: it wants a number, and uses it on no layer of this type
        text_values |= {"attention_chunk_size": text.max_position_embeddings, "layer_types": ["full_attention"] * text.num_hidden_layers}
    if vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text_values}
    vision_values = {name: getattr(vision, name) for name in VISION_SAME} | {
        "model_type": "llama4_vision_model",
        "hidden_act": "gelu",
        "rope_parameters": {"rope_theta": vision.rope_theta, "rope_type": "default"},
        "dtype": fields["dtype"],
    }
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "image_token_index": fields["image_token_index"],
        "tie_word_embeddings": text.tie_word_embeddings,
        "dtype": fields["dtype"],
        "text_config": text_values,
        "vision_config": vision_values,
    }
