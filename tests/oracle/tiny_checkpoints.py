"""Tiny random Llama 4 models of transformers, the oracle of the parity tests, and their checkpoints on disk."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig, Llama4VisionConfig

BOI, EOI, X_SEPARATOR, Y_SEPARATOR, IMAGE, PATCH = 1000, 1001, 1004, 1005, 1010, 1012


def text_values(variant: str = "maverick", **overrides: Any) -> dict[str, Any]:
    """Keyword arguments of a `Llama4TextConfig`: 8 layers, 5 query heads per key/value head, chunks of 16 tokens."""
    scout = variant == "scout"
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    if scout:
        rope = rope | {
            "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 64
        }  # fmt: skip
    values = dict(
        vocab_size=1024,
        hidden_size=160,
        intermediate_size=96,
        intermediate_size_mlp=192,
        num_hidden_layers=8,
        num_attention_heads=10,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4 if scout else 8,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1 if scout else 2,
        use_qk_norm=scout,
        attention_chunk_size=16,
        attn_temperature_tuning=True,
        floor_scale=8,
        attn_scale=0.1,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=[2, 3, 4],
        pad_token_id=5,
        tie_word_embeddings=False,
        rope_parameters=rope,
    )
    return values | overrides


def vision_values(**overrides: Any) -> dict[str, Any]:
    """Keyword arguments of a `Llama4VisionConfig`: tiles of 56 pixels, 4 tokens each."""
    values = dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        num_channels=3,
        vision_output_dim=96,
        projector_input_dim=96,
        projector_output_dim=96,
        pixel_shuffle_ratio=0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return values | overrides


def make_config(variant: str = "maverick", *, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Llama4Config:
    return Llama4Config(
        text_config=Llama4TextConfig(**text_values(variant, **(text or {}))),
        vision_config=Llama4VisionConfig(**vision_values(**(vision or {}))),
        boi_token_index=BOI,
        eoi_token_index=EOI,
        image_token_index=PATCH,
    )


def make_model(config: Llama4Config | Llama4TextConfig, *, seed: int = 0) -> torch.nn.Module:
    """A float32 eager model whose weights are exact in bfloat16 and large enough that every part shows in the logits."""
    family = Llama4ForConditionalGeneration if isinstance(config, Llama4Config) else Llama4ForCausalLM
    model = family._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise).to(torch.bfloat16))
    return model


def _scaled(name: str, noise: torch.Tensor) -> torch.Tensor:
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    if "embed_tokens" in name:
        return noise
    if "class_embedding" in name or "positional_embedding" in name:
        return 0.3 * noise
    if "router" in name:
        return 2.0 / math.sqrt(noise.shape[1]) * noise
    if ".experts." in name:  # [E, in, out], unlike the other weights
        return 1.5 / math.sqrt(noise.shape[1]) * noise
    return 1.2 / math.sqrt(noise.shape[-1]) * noise


def save_checkpoint(model: torch.nn.Module, directory: Path, *, release_spelling: bool = True, shard_size: str = "1MB") -> Path:
    """Write the model in bfloat16 as `save_pretrained` does, config.json in the releases' (4.51) spelling if asked."""
    import copy

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(directory, max_shard_size=shard_size)
    if release_spelling:
        _spell_as_released(directory / "config.json")
    return directory


def _spell_as_released(file: Path) -> None:
    values = json.loads(file.read_text())
    for part in [values[key] for key in ("text_config", "vision_config") if key in values] or [values]:
        rope = part.pop("rope_parameters")
        part["rope_theta"] = rope.pop("rope_theta")
        part["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        part["torch_dtype"] = part.pop("dtype", "bfloat16")
        part.pop("layer_types", None)
        part.pop("moe_layers", None)
        if "no_rope_layers" in part:
            part["no_rope_layers"] = []
    file.write_text(json.dumps(values, indent=2))


FP8_QUANTIZATION = {  # of the official FP8 checkpoint (spec section 5.2)
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    },
    "kv_cache_scheme": None,
    "ignore": ["re:.*lm_head", "re:.*self_attn.*", "re:.*router", "re:.*shared_expert.*", "re:.*vision_model.*"],
}


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] float8_e4m3fn and [out, 1] bfloat16 of a matrix [out, in], as compressed-tensors quantizes per channel."""
    scales = (weight.abs().amax(dim=1, keepdim=True) / 448.0).to(torch.bfloat16)
    return (weight / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def fp8_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors as the official FP8 checkpoint has them: routed experts one by one in FP8, all else in bfloat16."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj"):
            tensors[name] = tensor.to(torch.bfloat16)
            continue
        parts = tensor.chunk(2, dim=-1) if last == "gate_up_proj" else [tensor]
        for part, stack in zip(("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",), parts, strict=True):
            for expert, matrix in enumerate(stack):
                stored = f"{prefix}.{expert}.{part}.weight"
                tensors[stored], tensors[f"{stored}_scale"] = quantize_fp8(matrix.T.contiguous())
    return tensors


def save_fp8_checkpoint(model: torch.nn.Module, directory: Path, *, shard_bytes: int | None = 500_000) -> Path:
    """Write the model as the official FP8 checkpoint is: the shards that `save_pretrained` would make, or a single file."""
    from safetensors.torch import save_file

    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in fp8_tensors(model).items():
        if shard_bytes and sum(some.nbytes for some in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)] if shard_bytes else ["model.safetensors"]
    model.config.save_pretrained(directory)
    for file, tensors in zip(files, shards, strict=True):
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if shard_bytes:
        index = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))
    _spell_as_released(directory / "config.json")
    values = json.loads((directory / "config.json").read_text()) | {"quantization_config": FP8_QUANTIZATION}
    (directory / "config.json").write_text(json.dumps(values, indent=2))
    return directory


def image_block(rows: int, columns: int, tokens_per_tile: int) -> list[int]:
    """Token ids of one picture in the releases' layout, with the tiny vocabulary's special ids."""
    ids = [BOI]
    if rows * columns > 1:
        for _ in range(rows):
            for x in range(columns):
                ids += [PATCH] * tokens_per_tile + ([X_SEPARATOR] if x < columns - 1 else [])
            ids.append(Y_SEPARATOR)
    return [*ids, IMAGE, *[PATCH] * tokens_per_tile, EOI]
