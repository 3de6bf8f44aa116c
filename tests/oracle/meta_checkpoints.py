"""Tiny models of transformers written as Meta releases them: `consolidated.{rank}.pth` and `params.json`.

Written from the table of spec section 5.3, tensor by tensor, and knows nothing of `maverick_jax.convert`. Fused is the spelling of the
released files, un-fused that of the modules once their load hooks have run.

Axes: V vocabulary, D model width, F feed-forward width, E experts, R ranks.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

Split = Callable[[int], torch.Tensor]  # rank -> its tensor


def save_meta_checkpoint(
    model: torch.nn.Module, directory: Path, *, ranks: int, fused: bool = True, fp8: bool = False, scale_axes: int = 2
) -> Path:
    """Write a model with a vision tower in bfloat16.

    Args:
      ranks: files; all heads and widths must be multiples of it.
      fp8: routed experts in FP8, with scales in `fp8_scales_{rank}.pt`.
      scale_axes: 2 for scales [E, out], 3 for [E, out, 1].
    """
    directory.mkdir()
    splits = dict(_tensors(model, ranks, fused))
    scales: dict[str, Split] = {}
    if fp8:
        for name in [name for name in splits if ".experts." in name]:
            prefix, _, last = name.rpartition(".")
            part = {"moe_w_in_eD_F": "w1", "moe_w_out_eF_D": "w2", "moe_w_swiglu_eD_F": "w3"}.get(last, last)
            experts = model.config.text_config.num_local_experts
            splits[name], scales[f"{prefix}.{part}"] = _quantized(splits[name], experts, scale_axes)
    for rank in range(ranks):
        tensors = {name: split(rank) for name, split in splits.items()}
        tensors |= _no_weights(model, fused)
        torch.save(tensors, directory / f"consolidated.{rank:02}.pth")
        if fp8:
            torch.save({name: split(rank) for name, split in scales.items()}, directory / f"fp8_scales_{rank}.pt")
    (directory / "params.json").write_text(json.dumps(params(model), indent=2))
    return directory


def params(model: torch.nn.Module) -> dict:
    """The contents of `params.json`. Its widths are wrong on purpose: those of the tensors count."""
    text, vision = model.config.text_config, model.config.vision_config
    return {
        "dim": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "vocab_size": -1,
        "multiple_of": 2048,
        "ffn_dim_multiplier": 1.2,
        "ffn_exp": 4.0,
        "norm_eps": text.rms_norm_eps,
        "rope_theta": 500000.0,
        "use_scaled_rope": False,
        "nope_layer_interval": 4,
        "use_qk_norm": text.use_qk_norm,
        "attention_chunk_size": text.attention_chunk_size,
        "attn_temperature_tuning": True,
        "floor_scale": float(text.floor_scale),
        "attn_scale": text.attn_scale,
        "moe_args": {
            "num_experts": text.num_local_experts,
            "capacity_factor": 1.0,
            "auto_scale_F": True,
            "top_k": 1,
            "interleave_moe_layer_step": text.interleave_moe_layer_step,
        },
        "vision_args": {
            "image_size": {"height": vision.image_size, "width": vision.image_size},
            "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
            "dim": vision.hidden_size,
            "n_layers": vision.num_hidden_layers,
            "n_heads": vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "output_dim": vision.vision_output_dim,
            "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        },
    }


def _tensors(model: torch.nn.Module, ranks: int, fused: bool) -> Iterator[tuple[str, Split]]:
    """Meta's names, and what each rank has of them."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}

    def rows(tensor: torch.Tensor, axis: int = 0) -> Split:
        return lambda rank: tensor.chunk(ranks, axis)[rank].clone()

    def same(tensor: torch.Tensor) -> Split:
        return lambda rank: tensor.clone()

    def stacked(*tensors: torch.Tensor) -> Split:
        return lambda rank: torch.cat([tensor.chunk(ranks, 0)[rank] for tensor in tensors])

    yield "tok_embeddings.weight", rows(state["language_model.model.embed_tokens.weight"])
    yield "norm.weight", same(state["language_model.model.norm.weight"])
    yield "output.weight", rows(state["language_model.lm_head.weight"])
    for i in range(model.config.text_config.num_hidden_layers):
        theirs, ours = f"language_model.model.layers.{i}.", f"layers.{i}."
        layer = {name.removeprefix(theirs): tensor for name, tensor in state.items() if name.startswith(theirs)}
        query, key, value = (layer[f"self_attn.{part}_proj.weight"] for part in "qkv")
        yield ours + "attention.wo.weight", rows(layer["self_attn.o_proj.weight"], 1)
        if fused:
            yield ours + "attention.wqkv.layer_norm_weight", same(layer["input_layernorm.weight"])
            yield ours + "attention.wqkv.weight", stacked(query, key, value)
        else:
            yield ours + "attention_norm.weight", same(layer["input_layernorm.weight"])
            yield ours + "attention.wq.weight", rows(query)
            yield ours + "attention.wk.weight", rows(key)
            yield ours + "attention.wv.weight", rows(value)
        norm = layer["post_attention_layernorm.weight"]
        ours += "feed_forward."
        if "feed_forward.router.weight" not in layer:
            gate, up, down = (layer[f"feed_forward.{part}_proj.weight"] for part in ("gate", "up", "down"))
            if fused:
                yield ours + "mlp.layer_norm_weight", same(norm)
                yield ours + "mlp.fc1_weight", stacked(gate, up)
                yield ours + "mlp.fc2_weight", rows(down, 1)
            else:
                yield f"layers.{i}.ffn_norm.weight", same(norm)
                yield ours + "w1.weight", rows(gate)
                yield ours + "w2.weight", rows(down, 1)
                yield ours + "w3.weight", rows(up)
            continue
        gate_EDF, up_EDF = layer["feed_forward.experts.gate_up_proj"].chunk(2, -1)
        down_EFD = layer["feed_forward.experts.down_proj"]
        gate, up, down = (layer[f"feed_forward.shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down"))
        yield ours + "router_DE", same(layer["feed_forward.router.weight"].T.contiguous())
        if fused:
            yield ours + "norm.weight", same(norm)
            yield ours + "experts.moe_w_in_eD_F", rows(gate_EDF.reshape(-1, gate_EDF.shape[2]), 1)
            yield ours + "experts.moe_w_swiglu_eD_F", rows(up_EDF.reshape(-1, up_EDF.shape[2]), 1)
            yield ours + "experts.moe_w_out_eF_D", _flat(rows(down_EFD, 1))
            yield ours + "w_in_shared_FD.weight", rows(gate)
            yield ours + "w_swiglu_FD.weight", rows(up)
            yield ours + "w_out_shared_DF.weight", rows(down, 1)
        else:
            yield f"layers.{i}.ffn_norm.weight", same(norm)
            yield ours + "experts.w1", rows(gate_EDF, 2)
            yield ours + "experts.w2", rows(down_EFD, 1)
            yield ours + "experts.w3", rows(up_EDF, 2)
            yield ours + "shared_expert.w1.weight", rows(gate)
            yield ours + "shared_expert.w2.weight", rows(down, 1)
            yield ours + "shared_expert.w3.weight", rows(up)
    theirs, ours = "vision_model.", "vision_embeddings.vision_encoder."
    yield ours + "conv1._linear.weight", rows(state[theirs + "patch_embedding.linear.weight"])
    yield ours + "class_embedding", same(state[theirs + "class_embedding"])
    yield ours + "positional_embedding_vlm", same(state[theirs + "positional_embedding_vlm"])
    for kind in ("weight", "bias"):
        yield f"{ours}ln_pre.{kind}", same(state[f"{theirs}layernorm_pre.{kind}"])
        yield f"{ours}ln_post.{kind}", same(state[f"{theirs}layernorm_post.{kind}"])
        for i in range(model.config.vision_config.num_hidden_layers):
            block, layer = f"{ours}transformer.resblocks.{i}.", f"{theirs}model.layers.{i}."
            for part in "qkv":
                yield f"{block}attn.w{part}.{kind}", rows(state[f"{layer}self_attn.{part}_proj.{kind}"])
            yield f"{block}mlp.c_fc.{kind}", rows(state[f"{layer}mlp.fc1.{kind}"])
            yield f"{block}ln_1.{kind}", same(state[f"{layer}input_layernorm.{kind}"])
            yield f"{block}ln_2.{kind}", same(state[f"{layer}post_attention_layernorm.{kind}"])
            for name, stored in (("attn.wo", "self_attn.o_proj"), ("mlp.c_proj", "mlp.fc2")):
                tensor = state[f"{layer}{stored}.{kind}"]
                yield f"{block}{name}.{kind}", rows(tensor, 1) if kind == "weight" else same(tensor)
    yield "vision_embeddings.vision_adapter.mlp.c_fc.weight", rows(state[theirs + "vision_adapter.mlp.fc1.weight"])
    yield "vision_embeddings.vision_adapter.mlp.c_proj.weight", rows(state[theirs + "vision_adapter.mlp.fc2.weight"], 1)
    yield "vision_projection.weight", rows(state["multi_modal_projector.linear_1.weight"])


def _flat(split: Split) -> Split:
    """Each rank's stack of matrices one above the other."""
    return lambda rank: split(rank).flatten(0, 1)


def _no_weights(model: torch.nn.Module, fused: bool) -> dict[str, object]:
    """What the files hold besides weights."""
    text = model.config.text_config
    found: dict[str, object] = {"rope.freqs": torch.ones(text.head_dim // 2)}
    for i in range(text.num_hidden_layers):
        if fused:
            found[f"layers.{i}.attention.wqkv._extra_state"] = io.BytesIO(b"of Transformer Engine")
        if i % text.interleave_moe_layer_step == text.interleave_moe_layer_step - 1:
            prefix = f"layers.{i}.feed_forward."
            found[prefix + "global_gate_stats_3E"] = torch.zeros(3, text.num_local_experts)
            found[prefix + "running_gate_stats_3E"] = torch.zeros(3, text.num_local_experts)
            found[prefix + "experts.expert_activation_DE"] = torch.zeros(text.hidden_size, text.num_local_experts)
    return found


def _quantized(split: Split, experts: int, scale_axes: int) -> tuple[Split, Split]:
    """FP8 values in the layout of the weight, and a float32 scale per expert and output row of the transposed weight, of each rank."""

    def both(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight = split(rank)
        stack = weight.float().reshape(experts, -1, weight.shape[-1])  # [E, in, out]
        scales = stack.abs().amax(dim=1, keepdim=True) / 448.0
        values = (stack / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
        return values.reshape(weight.shape), scales[:, 0] if scale_axes == 2 else scales[:, 0, :, None]

    return lambda rank: both(rank)[0], lambda rank: both(rank)[1]
