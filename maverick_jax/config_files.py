"""Read Hugging Face `config.json` and Meta `params.json` into a `Config`, and write the former.

The tables below say what happens to every field. A field that is in none of them and asks for something is an
error: guessing that it does not matter is how ports go wrong. Sources: spec section 1.1, transformers'
`configuration_llama4.py`, Meta's `models/llama4/args.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from maverick_jax.config import NOPE_INTERVAL, Config, RopeScaling, TextConfig, VisionConfig
from maverick_jax.errors import UserError

TEXT_SAME = (  # same name and meaning in the file and in TextConfig
    "vocab_size hidden_size intermediate_size intermediate_size_mlp num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim num_local_experts attention_chunk_size use_qk_norm floor_scale attn_scale "
    "rms_norm_eps max_position_embeddings"
).split()
TEXT_READ: set[str] = {*TEXT_SAME} | set(
    "no_rope_layers no_rope_layer_interval moe_layers interleave_moe_layer_step rope_scaling rope_theta rope_parameters "
    "attn_temperature_tuning bos_token_id eos_token_id pad_token_id torch_dtype dtype layer_types".split()
)
TEXT_ONLY_VALUE = {  # fields whose other values ask for a computation that no Llama 4 release has
    "hidden_act": "silu",
    "num_experts_per_tok": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
VISION_SAME = (
    "num_channels hidden_size intermediate_size num_hidden_layers num_attention_heads projector_input_dim "
    "projector_output_dim vision_output_dim pixel_shuffle_ratio"
).split()
VISION_READ = {*VISION_SAME, "image_size", "patch_size", "rope_theta", "rope_parameters", "rope_scaling", "torch_dtype", "dtype"}
VISION_ONLY_VALUE = {"hidden_act": "gelu"}
TOP_READ: set[str] = set(
    "text_config vision_config image_token_index image_token_id torch_dtype dtype bos_token_id eos_token_id pad_token_id "
    "quantization_config".split()
)

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
    "unsloth_fixed tie_word_embeddings base_model_tp_plan base_model_pp_plan".split()
)


def read_huggingface(values: dict[str, Any]) -> Config:
    """`Config` of a Hugging Face `config.json`: nested (text and vision) or flat (text-only fine-tunes).

    Raises:
      UserError: another model family, an unknown field that asks for something, or values that disagree.
    """
    model_type = values.get("model_type")
    if model_type not in ("llama4", "llama4_text"):
        raise UserError(f"model_type is {model_type!r}, not 'llama4' or 'llama4_text': this is not a Llama 4 checkpoint.")
    nested = isinstance(values.get("text_config"), dict)
    if model_type == "llama4" and not nested:
        raise UserError("text_config is missing: a config.json with model_type 'llama4' needs one.")
    text = values["text_config"] if nested else values
    vision = values.get("vision_config") if nested else None
    if nested:
        _refuse_unknown("", values, TOP_READ, {"tie_word_embeddings": False})
        _refuse_unknown("text_config.", text, TEXT_READ, TEXT_ONLY_VALUE)
    else:
        _refuse_unknown("", text, TEXT_READ | TOP_READ, TEXT_ONLY_VALUE)
    token = {**{k: v for k, v in values.items() if v is not None}, **{k: v for k, v in text.items() if v is not None}}
    optional: dict[str, Any] = {}
    for name in ("bos_token_id", "pad_token_id"):
        if name in token:
            optional[name] = token[name]
    if "eos_token_id" in token:
        optional["eos_token_id"] = _as_tuple(token["eos_token_id"])
    patch_id = values.get("image_token_index", values.get("image_token_id"))
    if patch_id is not None:
        optional["image_token_index"] = patch_id
    dtype = values.get("dtype") or values.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype") or "bfloat16"
    return Config(text=_read_text(text), vision=_read_vision(vision), dtype=str(dtype).removeprefix("torch."), **optional)


def _refuse_unknown(prefix: str, values: dict[str, Any], read: set[str], only_value: dict[str, Any]) -> None:
    for name, value in values.items():
        if name in only_value and value is not None:
            if value != only_value[name]:
                raise UserError(f"{prefix}{name} is {value!r}; only {only_value[name]!r} is supported.")
        elif name in read or name in NOISE or name.startswith("_"):
            continue
        elif value is None or value is False or value == [] or value == {}:
            continue  # an unknown switch that is off
        else:
            raise UserError(
                f"unknown field {prefix}{name} = {value!r}: it may change the result. Remove it from config.json if it does not matter."
            )


def _read_text(values: dict[str, Any]) -> TextConfig:
    required = [n for n in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads") if values.get(n) is None]
    if required:
        raise UserError(f"{', '.join(required)} missing: this config.json does not describe a Llama 4 text model.")
    defaults = dict(  # transformers' defaults, for files that leave a field out
        intermediate_size=8192,
        intermediate_size_mlp=16384,
        num_key_value_heads=values["num_attention_heads"] if "num_key_value_heads" in values else 8,
        head_dim=values["hidden_size"] // values["num_attention_heads"] if "head_dim" in values else 128,
        num_local_experts=16,
        use_qk_norm=True,
        floor_scale=8192,
        attn_scale=0.1,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
    )
    same: dict[str, Any] = {
        name: defaults[name] if values.get(name) is None and name in defaults else values.get(name) for name in TEXT_SAME
    }
    if "attention_chunk_size" not in values:
        same["attention_chunk_size"] = 8192  # absent is the default; null is full attention (Llama Guard 4)
    same["floor_scale"] = int(same["floor_scale"])
    layers = values["num_hidden_layers"]
    temperature = values.get("attn_temperature_tuning")
    rope = _read_rope(values, default_theta=500000.0)
    return TextConfig(
        **same,
        nope_layers=_nope_layers(values, layers),
        moe_layers=_moe_layers(values, layers),
        attn_temperature_tuning=True if temperature is None else bool(temperature),  # some mirrors write the integer 4
        rope_theta=rope[0],
        rope_scaling=rope[1],
    )


def _nope_layers(values: dict[str, Any], layers: int) -> tuple[int, ...]:
    """Layers without RoPE. In the file's list a 1 means "uses RoPE", against its name; absent or `[]` means every fourth."""
    uses_rope = values.get("no_rope_layers")
    if not uses_rope:
        interval = values.get("no_rope_layer_interval") or NOPE_INTERVAL
        nope = tuple(i for i in range(layers) if (i + 1) % interval == 0)
    elif len(uses_rope) < layers:
        raise UserError(f"no_rope_layers has {len(uses_rope)} entries for {layers} layers: give one per layer (1: RoPE, 0: none) or [].")
    else:
        nope = tuple(i for i in range(layers) if not uses_rope[i])
    kinds = values.get("layer_types")
    if kinds and values.get("attention_chunk_size", 8192) is not None:
        expected = ["full_attention" if i in nope else "chunked_attention" for i in range(layers)]
        if list(kinds) != expected:
            raise UserError(
                "layer_types disagrees with no_rope_layers: chunked_attention belongs to the layers with RoPE and to no others."
            )
    return nope


def _moe_layers(values: dict[str, Any], layers: int) -> tuple[int, ...]:
    listed = values.get("moe_layers")
    if listed is not None:
        return tuple(sorted(listed))
    step = values.get("interleave_moe_layer_step", 1)
    return tuple(range(step - 1, layers, step)) if step else ()


def _read_rope(values: dict[str, Any], default_theta: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_parameters` (5.x) or from `rope_theta` and `rope_scaling` (4.51)."""
    new = values.get("rope_parameters") or {}
    scaling = {**(values.get("rope_scaling") or {}), **new}
    theta = new.get("rope_theta", values.get("rope_theta") or scaling.get("rope_theta") or default_theta)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UserError(f"rope type {kind!r} is not supported: Llama 4 has 'default' and 'llama3'.")
    fields = [f.name for f in dataclasses.fields(RopeScaling)]
    missing = [name for name in fields if scaling.get(name) is None]
    if missing:
        raise UserError(f"rope scaling of type 'llama3' lacks {', '.join(missing)}.")
    return float(theta), RopeScaling(**{name: scaling[name] for name in fields})


def _read_vision(values: dict[str, Any] | None) -> VisionConfig | None:
    if not values:
        return None
    _refuse_unknown("vision_config.", values, VISION_READ, VISION_ONLY_VALUE)
    theta, scaling = _read_rope(values, default_theta=10000.0)
    if scaling is not None:
        raise UserError("vision_config asks for RoPE scaling: the vision tower has none.")
    same = {name: values[name] for name in VISION_SAME if values.get(name) is not None}
    sizes = {name: _square(name, values[name]) for name in ("image_size", "patch_size") if values.get(name) is not None}
    return VisionConfig(**same, **sizes, rope_theta=theta)


def _square(name: str, value: int | list[int] | dict[str, int]) -> int:
    sides = [value] if isinstance(value, int) else list(value.values()) if isinstance(value, dict) else list(value)
    if len(set(sides)) != 1:
        raise UserError(f"vision {name} is {value!r}: tiles and patches are squares.")
    return sides[0]


def _as_tuple(ids: int | list[int]) -> tuple[int, ...]:
    return tuple(ids) if isinstance(ids, list) else (ids,)


def read_meta(values: dict[str, Any]) -> Config:
    """`Config` of a Meta `params.json`. Widths are derived the way Meta's own code derives them (spec section 5.3).

    Raises:
      UserError: no mixture-of-experts model, or a field is missing.
    """
    values = {**values, **values.get("model", {})}
    missing = [name for name in ("dim", "n_layers", "n_heads", "vocab_size") if name not in values]
    if missing:
        raise UserError(f"{', '.join(missing)} missing: this params.json does not describe a Llama 4 model.")
    moe, vision = values.get("moe_args") or {}, values.get("vision_args")
    if moe.get("top_k", 1) != 1:
        raise UserError(f"moe_args.top_k is {moe['top_k']}; only 1 is supported.")
    dim, layers, heads = values["dim"], values["n_layers"], values["n_heads"]
    multiple, scale = values.get("multiple_of", 256), values.get("ffn_dim_multiplier") or 1.0

    def width(base: int, divisor: float = 1.0) -> int:
        return -(-int(int(scale * int(2 * base / 3)) / divisor) // multiple) * multiple

    # Meta halves the experts' width by (capacity_factor + 1) where auto_scale_F is set: routed plus shared cost one dense layer.
    divisor = moe.get("capacity_factor", 1.0) + 1 if moe.get("auto_scale_F", True) else 1.0
    interval = values.get("nope_layer_interval") or 0
    step = moe.get("interleave_moe_layer_step", 1) if moe else 0
    scaling = None
    if values.get("use_scaled_rope"):
        scaling = RopeScaling(
            factor=float(values.get("rope_scaling_factor") or 16.0),
            low_freq_factor=1.0,
            high_freq_factor=float(values.get("rope_high_freq_factor") or 1.0),
            original_max_position_embeddings=8192,
        )
    text = TextConfig(
        vocab_size=values["vocab_size"] if values["vocab_size"] > 0 else 202048,
        hidden_size=dim,
        intermediate_size=width(int(values.get("ffn_exp", 4.0) * dim), divisor),
        intermediate_size_mlp=width(4 * dim),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=values.get("n_kv_heads") or heads,
        head_dim=values.get("head_dim") or dim // heads,
        num_local_experts=moe.get("num_experts", 1),
        moe_layers=tuple(range(step - 1, layers, step)) if step else (),
        nope_layers=tuple(i for i in range(layers) if interval and (i + 1) % interval == 0),
        attention_chunk_size=values.get("attention_chunk_size"),
        use_qk_norm=bool(values.get("use_qk_norm", False)),
        rope_theta=float(values.get("rope_theta", 500000.0)),
        rope_scaling=scaling,
        attn_temperature_tuning=bool(values.get("attn_temperature_tuning", False)),
        floor_scale=int(values.get("floor_scale", 8192)),
        attn_scale=float(values.get("attn_scale", 0.1)),
        rms_norm_eps=float(values.get("norm_eps", 1e-5)),
        max_position_embeddings=values.get("max_seq_len") or 1048576,
    )
    return Config(text=text, vision=_read_meta_vision(vision))


def _read_meta_vision(values: dict[str, Any] | None) -> VisionConfig | None:
    if not values:
        return None
    ratio, width = values.get("pixel_shuffle_ratio", 0.5), values["output_dim"]
    return VisionConfig(
        image_size=_square("image_size", values["image_size"]),
        patch_size=_square("patch_size", values["patch_size"]),
        hidden_size=values["dim"],
        intermediate_size=int(values["mlp_ratio"] * values["dim"]),
        num_hidden_layers=values["n_layers"],
        num_attention_heads=values["n_heads"],
        projector_input_dim=width,
        projector_output_dim=width,
        vision_output_dim=width,
        pixel_shuffle_ratio=ratio,
    )


def write_huggingface(config: Config) -> dict[str, Any]:
    """The `config.json` (transformers 5.x spelling) of a model: what `read_huggingface` reads back to an equal `Config`."""
    text = config.text
    rope: dict[str, Any] = {"rope_theta": text.rope_theta, "rope_type": "default"}
    if text.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(text.rope_scaling)}
    text_values = {name: getattr(text, name) for name in TEXT_SAME} | {
        "model_type": "llama4_text",
        "hidden_act": "silu",
        "num_experts_per_tok": 1,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "attn_temperature_tuning": text.attn_temperature_tuning,
        "moe_layers": list(text.moe_layers),
        "no_rope_layers": [int(i not in text.nope_layers) for i in range(text.num_hidden_layers)],
        "rope_parameters": rope,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_id),
        "pad_token_id": config.pad_token_id,
        "dtype": config.dtype,
    }
    if config.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text_values}
    vision = config.vision
    vision_values = {name: getattr(vision, name) for name in (*VISION_SAME, "image_size", "patch_size")} | {
        "model_type": "llama4_vision_model",
        "hidden_act": "gelu",
        "rope_parameters": {"rope_theta": vision.rope_theta, "rope_type": "default"},
        "dtype": config.dtype,
    }
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "image_token_index": config.image_token_index,
        "tie_word_embeddings": False,
        "dtype": config.dtype,
        "text_config": text_values,
        "vision_config": vision_values,
    }
