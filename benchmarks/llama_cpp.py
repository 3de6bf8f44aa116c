"""llama.cpp as a peer: a text model of Llama 4 written as GGUF, and its own batched benchmark of it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Llama4ForCausalLM

PROGRAM = "llama-batched-bench"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
    "feed_forward.experts.gate_proj": "ffn_gate_exps",
    "feed_forward.experts.up_proj": "ffn_up_exps",
    "feed_forward.experts.down_proj": "ffn_down_exps",
}


def find_program(folder: Path) -> Path:
    """llama.cpp's benchmark in the folder of its sources, where CMake builds it.

    Raises:
      SystemExit: it is not there.
    """
    program = folder / "build/bin" / PROGRAM
    if not program.exists():
        sys.exit(f"there is no {program}: build it with `cmake -B build && cmake --build build --target {PROGRAM}` in {folder}.")
    return program


def write_gguf(model: Llama4ForCausalLM, folder: Path, path: Path) -> None:
    """The model without a tokenizer, matrices in its dtype, vectors and routers in float32, as llama.cpp's own converter has them.

    Args:
      folder: of llama.cpp's sources: their `gguf-py` does the writing.
    """
    sys.path.insert(0, str(folder / "gguf-py"))
    gguf: Any = importlib.import_module("gguf")
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama4")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size_mlp)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_interleave_moe_layer_step(config.interleave_moe_layer_step)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, tensor in _tensors(model):
        if tensor.ndim == 1 or tensor.dtype == torch.float32 or "ffn_gate_inp." in name:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Llama4ForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """Outputs first, as llama.cpp multiplies; an expert's gate and up apart."""
    for name, tensor in model.state_dict().items():
        parts = {name.removesuffix(".weight"): tensor}
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.transpose(1, 2).chunk(2, dim=1)
            parts = {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        elif name.endswith("experts.down_proj"):
            parts = {name: tensor.transpose(1, 2)}
        for ours, part in parts.items():
            yield _name(ours), part.contiguous()


def _name(name: str) -> str:
    """`model.layers.1.self_attn.q_proj` -> `blk.1.attn_q.weight`"""
    if not name.startswith("model.layers."):
        return f"{NAMES[name]}.weight"
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest]}.weight"


def run(program: Path, path: Path, *, prompt: int, steps: int, threads: int) -> list[float]:
    """Seconds of a prefill of one prompt, of a decode step of one row, and of one of eight."""
    sizes = ["-npp", str(prompt), "-ntg", str(steps), "-npl", "1,8", "-c", str(8 * (prompt + steps)), "-t", str(threads)]
    command = [program, "-m", path, *sizes, "--output-format", "jsonl"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    one, eight = (json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{"))
    return [one["t_pp"], one["t_tg"] / steps, eight["t_tg"] / steps]
