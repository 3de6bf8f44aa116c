"""Read Meta's `params.json`. Widths are derived the way Meta's own code derives them (spec section 5.3).

Source: Llama 4 reference, `models/llama4/args.py` and `models/llama4/ffn.py`.
"""

from __future__ import annotations

from typing import Any

from maverick_jax.config import checks
from maverick_jax.config.checks import without_null
from maverick_jax.config.parts import RopeScaling, TextConfig, VisionConfig

FACTOR = checks.number("a number above 0 and up to 1,000", lambda value: 0 < value <= 1000)  # they multiply a width
PARAMS = {
    "dim": checks.TEXT["hidden_size"],
    "n_layers": checks.TEXT["num_hidden_layers"],
    "n_heads": checks.TEXT["num_attention_heads"],
    "n_kv_heads": checks.TEXT["num_key_value_heads"],
    "head_dim": checks.TEXT["head_dim"],
    "vocab_size": checks.whole(-1, 1 << 24),
    "multiple_of": checks.WIDTH,
    "ffn_dim_multiplier": FACTOR,
    "ffn_exp": FACTOR,
    "norm_eps": checks.TEXT["rms_norm_eps"],
    "attention_chunk_size": checks.TOKENS,
    "rope_theta": checks.TEXT["rope_theta"],
    "use_scaled_rope": checks.FLAG,
    "rope_scaling_factor": checks.ROPE_SCALING["factor"],
    "rope_high_freq_factor": checks.ROPE_SCALING["high_freq_factor"],
    "nope_layer_interval": checks.STEP,
    "use_qk_norm": checks.FLAG,
    "attn_temperature_tuning": checks.SWITCH,
    "floor_scale": checks.TOKENS_AS_FLOAT,
    "attn_scale": checks.TEXT["attn_scale"],
    "max_seq_len": checks.TEXT["max_position_embeddings"],
    "moe_args": checks.OBJECT,
    "vision_args": checks.OBJECT,
}
MOE = {
    "num_experts": checks.TEXT["num_local_experts"],
    "capacity_factor": FACTOR,
    "auto_scale_F": checks.FLAG,
    "top_k": checks.whole(1, 1),
    "interleave_moe_layer_step": checks.STEP,
}
VISION = {
    "image_size": checks.VISION["image_size"],
    "patch_size": checks.VISION["patch_size"],
    "dim": checks.VISION["hidden_size"],
    "n_layers": checks.VISION["num_hidden_layers"],
    "n_heads": checks.VISION["num_attention_heads"],
    "mlp_ratio": FACTOR,
    "output_dim": checks.VISION["vision_output_dim"],
    "pixel_shuffle_ratio": checks.VISION["pixel_shuffle_ratio"],
}
VOCABULARY = 202048  # of the releases, whose files may say -1


def read(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of the `Config` that a `params.json` describes, whose values may be nested under "model".

    Raises:
      UserError: a field is missing, or has a value that no model has.
    """
    checks.check(without_null(values), {"model": checks.OBJECT})
    given = without_null({**values, **(values.get("model") or {})})
    checks.require(given, ("dim", "n_layers", "n_heads", "vocab_size"))
    checks.check(given, PARAMS)
    found: dict[str, Any] = {"text": _read_text(given, _read_experts(given))}
    return found | ({"vision": _read_vision(given["vision_args"])} if given.get("vision_args") else {})


def _read_experts(given: dict[str, Any]) -> dict[str, Any]:
    moe = without_null(given.get("moe_args", {}))
    if moe:
        checks.require(moe, ("num_experts",), "moe_args.")
        checks.check(moe, MOE, "moe_args.")
    return moe


def _read_text(given: dict[str, Any], moe: dict[str, Any]) -> TextConfig:
    dim, layers, heads = given["dim"], given["n_layers"], given["n_heads"]
    multiple, scale = given.get("multiple_of", 256), given.get("ffn_dim_multiplier", 1.0)

    def width(base: int, divisor: float = 1.0) -> int:
        return -(-int(int(scale * int(2 * base / 3)) / divisor) // multiple) * multiple

    # Meta halves the experts' width by (capacity_factor + 1) where auto_scale_F is set: routed plus shared cost one dense layer.
    divisor = moe.get("capacity_factor", 1.0) + 1 if moe.get("auto_scale_F", True) else 1.0
    interval = given.get("nope_layer_interval", 0)
    step = moe.get("interleave_moe_layer_step", 1) if moe else 0
    scaling = None
    if given.get("use_scaled_rope"):
        scaling = RopeScaling(
            factor=float(given.get("rope_scaling_factor", 16.0)),
            low_freq_factor=1.0,
            high_freq_factor=float(given.get("rope_high_freq_factor", 1.0)),
            original_max_position_embeddings=8192,
        )
    return TextConfig(
        vocab_size=given["vocab_size"] if given["vocab_size"] > 0 else VOCABULARY,
        hidden_size=dim,
        intermediate_size=width(int(given.get("ffn_exp", 4.0) * dim), divisor),
        intermediate_size_mlp=width(4 * dim),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=given.get("n_kv_heads", heads),
        head_dim=given.get("head_dim", dim // heads),
        num_local_experts=moe.get("num_experts", 0),
        moe_layers=tuple(range(step - 1, layers, step)) if step else (),
        nope_layers=tuple(range(interval - 1, layers, interval)) if interval else (),
        attention_chunk_size=given.get("attention_chunk_size"),
        use_qk_norm=given.get("use_qk_norm", False),
        rope_theta=float(given.get("rope_theta", 500000.0)),
        rope_scaling=scaling,
        attn_temperature_tuning=bool(given.get("attn_temperature_tuning", False)),
        floor_scale=int(given.get("floor_scale", 8192)),
        attn_scale=float(given.get("attn_scale", 0.1)),
        rms_norm_eps=float(given.get("norm_eps", 1e-5)),
        max_position_embeddings=given.get("max_seq_len", 1048576),
    )


def _read_vision(values: dict[str, Any]) -> VisionConfig:
    given, prefix = without_null(values), "vision_args."
    given |= {name: checks.square(f"{prefix}{name}", given[name]) for name in ("image_size", "patch_size") if name in given}
    checks.require(given, (name for name in VISION if name != "pixel_shuffle_ratio"), prefix)
    checks.check(given, VISION, prefix)
    width = given["output_dim"]
    return VisionConfig(
        image_size=given["image_size"],
        patch_size=given["patch_size"],
        hidden_size=given["dim"],
        intermediate_size=int(given["mlp_ratio"] * given["dim"]),
        num_hidden_layers=given["n_layers"],
        num_attention_heads=given["n_heads"],
        projector_input_dim=width,
        projector_output_dim=width,
        vision_output_dim=width,
        pixel_shuffle_ratio=given.get("pixel_shuffle_ratio", 0.5),
    )
