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
# # Quick start
#
# A small Llama 4 with every part of the large ones (128 experts, a shared expert, dense and mixture layers in turn, layers
# without RoPE, a vision tower) answers questions about two handwritten digits. It ships inside the package, so this
# notebook needs no network and no accelerator: eight devices are simulated.

# %%
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import maverick_jax as mj
from maverick_jax.assets import digits

mesh = mj.make_mesh(expert=8)
model = mj.load(mesh=mesh)

# %% [markdown]
# ## The parameters
#
# Every parameter carries logical axis names; a layout maps them to mesh axes. Layers are a list, so a checkpoint streams
# leaf by leaf. Here are the first two layers: a dense one and a mixture of experts.

# %%
for path, leaf in nnx.to_flat_state(nnx.state(model)):
    name = ".".join(map(str, path))
    if name.startswith(("text.layers.0.", "text.layers.1.")):
        print(f"{name:42} {leaf.shape!s:16} {leaf.get_metadata()['axes']}")

# %% [markdown]
# ## One expert tensor on the mesh
#
# `[experts, model, width]` lies on the `expert` axis of the mesh: every device holds 16 of the 128 experts, whole. Tokens
# travel to them by all-to-all.

# %%
weight = model.text.layers[1].feed_forward.experts.gate[...]
owner = np.zeros(weight.shape[0], int)
for shard in weight.addressable_shards:
    owner[shard.index[0]] = shard.device.id

figure, axis = plt.subplots(figsize=(9, 1.6))
axis.imshow(owner[None], aspect="auto", cmap="tab10")
for device in range(mesh.size):
    axis.text(np.flatnonzero(owner == device).mean(), 0, f"device {device}", ha="center", va="center", color="white")
axis.set(yticks=[], xlabel="expert", title=f"text.layers.1.feed_forward.experts.gate {weight.shape}, {weight.sharding.spec}")
plt.show()

# %% [markdown]
# ## A chat about a picture
#
# Two pictures that the model has never seen.

# %%
question, left, right, expected = digits.held_out_examples(23)[22]
pixels, _ = digits.held_out()
pictures = [digits.picture(pixels[i]) for i in (left, right)]

figure, axes = plt.subplots(1, 2, figsize=(4, 2))
for axis, picture in zip(axes, pictures, strict=True):
    axis.imshow(picture, cmap="gray")
    axis.axis("off")
plt.show()

chat = mj.Chat(model, max_new_tokens=32)
print(question)
print(chat(question, images=pictures))
print("expected:", expected)

# %% [markdown]
# ## Which experts did the work
#
# Every token goes to one expert per mixture layer, and none is ever dropped. The last layer is dark: of a prompt it computes
# only the last token, for nothing else of it is read.

# %%
load = chat.engine.load_ME
figure, axis = plt.subplots(figsize=(9, 2))
image = axis.imshow(load, aspect="auto", cmap="magma")
layers = model.config.text.moe_layers
axis.set(xlabel="expert", ylabel="layer", yticks=range(len(layers)), yticklabels=layers)
axis.set_title(f"tokens per expert, dropped = {chat.engine.dropped}")
figure.colorbar(image)
plt.show()

# %% [markdown]
# ## Your own checkpoint
#
# `maverick convert HF_DIR OUT` once, then `mj.load("OUT", mesh=...)`. A Hugging Face directory can also be opened as it is.
