# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Port a checkpoint
#
# From PyTorch to Orbax and back, with a proof at every step: a small random Llama 4 of transformers is saved as a Hugging Face
# checkpoint, converted, verified, quantized, exported, and opened by transformers again. No network, no accelerator;
# it takes PyTorch and transformers (`pip install 'maverick-jax[torch,notebooks]' transformers`).

# %%
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig, Llama4VisionConfig
from transformers.utils import logging

import maverick_jax as mj
from maverick_jax.convert import convert, export, inspect
from maverick_jax.convert.proof.compare import compare
from maverick_jax.convert.proof.verify import verify
from maverick_jax.ops.quantize import dequantize

logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.simplefilter("ignore")
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A checkpoint of PyTorch
#
# Maverick's plan in small: dense and mixture layers in turn, every fourth layer without RoPE, chunks of 16 tokens, a vision tower.

# %%
rope = {"rope_type": "default", "rope_theta": 500000.0}
text = Llama4TextConfig(
    vocab_size=1024, hidden_size=160, intermediate_size=96, intermediate_size_mlp=192, num_hidden_layers=8,
    num_attention_heads=10, num_key_value_heads=2, head_dim=16, num_local_experts=8, interleave_moe_layer_step=2,
    use_qk_norm=False, attention_chunk_size=16, floor_scale=8, pad_token_id=5, rope_parameters=rope,
)  # fmt: skip
vision = Llama4VisionConfig(
    hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14,
    vision_output_dim=96, projector_input_dim=96, projector_output_dim=96,
)  # fmt: skip
torch.manual_seed(0)
model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision, image_token_index=1012))
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.ndim > 1:  # transformers' own initial values are so small that nothing shows in the logits
            parameter.normal_(std=1.2 / parameter.shape[-1] ** 0.5)
model.to(torch.bfloat16).save_pretrained(folder / "pytorch", max_shard_size="2MB")
for file in sorted((folder / "pytorch").iterdir()):
    print(f"{file.stat().st_size:>10,}  {file.name}")

# %% [markdown]
# ## Convert
#
# One call, or `maverick convert pytorch orbax`. Gate and up, which PyTorch keeps in one tensor, become two; every matrix has its
# inputs first. `params/` is an ordinary Orbax checkpoint.

# %%
print(convert(folder / "pytorch", folder / "orbax", progress=False).as_text())
for entry in inspect(folder / "orbax").entries:
    if "layers.1." in entry.parameter and "text" in entry.parameter:
        print(f"{entry.parameter:42} {entry.shape!s:16} {entry.dtype}")

# %% [markdown]
# ## Verify
#
# All digests are taken again, and every tensor is made again from the checkpoint and compared.

# %%
report = verify(folder / "orbax", folder / "pytorch", progress=False)
print(report.as_text())

# %% [markdown]
# Then both models run on a prompt with a picture, layer by layer, in float32. Each goes on with its own values, so what is seen is
# how rounding adds up. A wrong port, such as attention chunks on the wrong layers, differs by about one.

# %%
exact = compare(folder / "orbax", folder / "pytorch", progress=False)
print(exact.as_table())

# %% [markdown]
# ## Quantize
#
# The same checkpoint with its routed experts in 8 and in 4 bits: where the errors come in, and how far they carry.

# %%
for form in ("int8", "int4"):
    print(form, convert(folder / "pytorch", folder / form, target=form, progress=False).as_text())

figure, axis = plt.subplots(figsize=(9, 3))
for form, style in (("orbax", "o-"), ("int8", "s-"), ("int4", "^-")):
    found = exact if form == "orbax" else compare(folder / form, folder / "pytorch", progress=False)
    stages = [row.stage for row in found.rows]
    axis.semilogy(stages, [row.relative for row in found.rows], style, label="bfloat16" if form == "orbax" else form)
axis.axhline(1e-4, color="gray", linestyle=":", label="what a port may differ")
axis.set(ylabel="largest relative difference", title="against transformers, stage by stage")
axis.tick_params(axis="x", rotation=30)
axis.legend(loc="center right")
plt.show()

# %% [markdown]
# Errors come in with the first mixture layer and stay about the weights' own; where one of them sends a token to another expert,
# that token's jumps. Here is the first mixture layer's gate: what int4 rounds away, in units of the matrix's deviation.

# %%
gates = [mj.load(folder / form).text.layers[1].feed_forward.experts.gate[...] for form in ("orbax", "int4")]
weights = [np.asarray(gates[0], np.float32), np.asarray(dequantize(gates[1], lead=1), np.float32)]
figure, axis = plt.subplots(figsize=(9, 2))
axis.hist(((weights[1] - weights[0]) / weights[0].std()).ravel(), bins=80)
axis.set(xlabel="error / deviation of the weights", yticks=[], title="int4, a scale for every 80 inputs")
plt.show()

# %% [markdown]
# ## Back to PyTorch
#
# Export gives the same tensors, byte for byte, and transformers finds all of them.

# %%
export(folder / "orbax", folder / "again", progress=False)
again, loading = Llama4ForConditionalGeneration.from_pretrained(folder / "again", dtype=torch.bfloat16, output_loading_info=True)
before, after = model.state_dict(), again.state_dict()
print("missing:", len(loading["missing_keys"]), " unexpected:", len(loading["unexpected_keys"]))
print("tensors that differ:", sum(not torch.equal(tensor, after[name]) for name, tensor in before.items()), "of", len(before))

# %% [markdown]
# ## Your own
#
# The same commands take the released checkpoints, Hugging Face's in bfloat16 or FP8 and Meta's `.pth` files, in less than 1 GB of memory:
# `maverick convert Llama-4-Maverick-17B-128E-Instruct maverick --dry-run` says first what it will take.
