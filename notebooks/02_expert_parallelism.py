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
# # Expert parallelism: what travels where
#
# A mixture layer sends each token through one of 128 experts. The experts are most of the model, so they are spread over
# devices, and tokens travel to them. This notebook follows a real batch of the embedded mini model through one such layer,
# on eight simulated devices. It needs no network and no accelerator.

# %%
import dataclasses
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from IPython.display import Image, display
from matplotlib.patches import Rectangle

import maverick_jax as mj
from maverick_jax.assets import digits
from maverick_jax.plan import make_plan
from maverick_jax.plan.plot import save_plot
from maverick_jax.sharding import LATENCY, THROUGHPUT, AllToAll, Dispatcher, Local, Ragged

mesh = mj.make_mesh(expert=8)  # before jax starts: this asks for the eight devices
N = mesh.size
COLOURS = plt.colormaps["tab10"].colors

# %% [markdown]
# ## A batch of questions
#
# 32 questions, each about two handwritten digits that the model has never seen. These are the first four.

# %%
examples = digits.held_out_examples(32)
pixels, _ = digits.held_out()

figure, axes = plt.subplots(1, 4, figsize=(10, 1.7), layout="constrained")
for axis, (question, left, right, _) in zip(axes, examples, strict=False):
    axis.imshow(np.hstack([pixels[left], pixels[right]]), cmap="gray")
    axis.axvline(7.5, color="white")
    axis.set_title(question, fontsize=10)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Who holds what
#
# A layout is a table from the axes of an array to the axes of the mesh. Two arrays matter here: the experts' weights
# `[experts, model, width]` (above), and the tokens `[tokens, model]` (below). The numbers are devices; where a block shows
# several, each of them has a copy.
#
# * **throughput, expert=8**: every device holds 16 whole experts and an eighth of the tokens. Tokens travel.
# * **throughput, data=2, expert=2, tensor=2**: two copies of the experts, one for each half of the tokens. `expert` divides
#   the experts, `tensor` divides the width of each. Tokens travel between two devices only, and results are summed over two.
# * **latency, expert=8**: every device holds a slice of every expert and sees every token. No token travels to an expert;
#   the results are summed over all devices.


# %%
def draw_sharding(axis, sharding, shape, across, down):
    """The blocks of an array: axis `across` of it to the right, axis `down` downwards."""
    holders = {}
    for device, index in sharding.devices_indices_map(shape).items():
        block = tuple(index[i].indices(shape[i])[:2] for i in (across, down))
        holders.setdefault(block, []).append(device.id)
    for ((left, right), (top, bottom)), devices in holders.items():
        everyone = len(devices) == N
        colour = "lightgray" if everyone else COLOURS[devices[0]]
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, facecolor=colour, edgecolor="white", linewidth=2))
        text = f"all {N} devices" if everyone else ", ".join(map(str, sorted(devices)))
        style = {"ha": "center", "va": "center", "color": "black" if everyone else "white", "weight": "bold"}
        axis.text((left + right) / 2, (top + bottom) / 2, text, **style)
    axis.set(xlim=(0, shape[across]), ylim=(shape[down], 0), xticks=[0, shape[across]], yticks=[0, shape[down]])
    axis.spines[:].set_visible(False)


E, D, F = 128, 64, 32
cases = [(THROUGHPUT, {"expert": 8}), (THROUGHPUT, {"data": 2, "expert": 2, "tensor": 2}), (LATENCY, {"expert": 8})]
figure, axes = plt.subplots(2, 3, figsize=(12, 5), layout="constrained", height_ratios=(2, 1))
for (weights_axis, tokens_axis), (layout, sizes) in zip(axes.T, cases, strict=True):
    case_mesh = mj.make_mesh(**sizes)
    draw_sharding(weights_axis, layout.sharding(("expert", "embed", "expert_mlp"), (E, D, F), case_mesh), (E, D, F), 0, 2)
    draw_sharding(tokens_axis, layout.sharding(("tokens", None), (1024, D), case_mesh), (1024, D), 0, 1)
    weights_axis.set_title(f"{layout.name}, {', '.join(f'{axis}={size}' for axis, size in sizes.items())}", weight="bold")
    weights_axis.set(xlabel="expert", ylabel="width of an expert")
    tokens_axis.set(xlabel="token", ylabel="model width")
plt.show()

# %% [markdown]
# ## Listening at a mixture layer
#
# A dispatcher takes tokens, the number of the expert that each is for, and the experts; it returns what the experts answered.
# Anything with this signature will do. Ours writes down what it was given and passes it on to `AllToAll`, which is what a
# mesh with experts on several devices gets by default.


# %%
@dataclasses.dataclass(frozen=True)
class Listening:
    """Keeps the tokens and expert numbers of every layer; another dispatcher does the work."""

    worker: Dispatcher
    heard: list = dataclasses.field(default_factory=list, compare=False)

    def __call__(self, x_TD, expert_T, experts):
        self.heard.append((x_TD, expert_T))
        return self.worker(x_TD, expert_T, experts)


listening = Listening(AllToAll(mesh, THROUGHPUT))
model = mj.load(mesh=mesh, dispatcher=listening)


@nnx.jit
def heard_by_layer(model, token_ids, tiles, lengths):
    model(token_ids, tiles, lengths=lengths)
    return [listening.heard.pop(0) for _ in model.config.text.moe_layers]


chat = mj.Chat(model)  # for its tokenizer and template
prompts = [
    chat.prompt(digits.messages(question, digits.picture(pixels[left]), digits.picture(pixels[right])))
    for question, left, right, _ in examples
]
lengths = np.array([len(prompt.token_ids) for prompt in prompts])
token_ids = np.zeros((len(prompts), lengths.max()), np.int32)
for row, prompt in zip(token_ids, prompts, strict=True):
    row[: len(prompt.token_ids)] = prompt.token_ids

layers = heard_by_layer(model, token_ids, np.concatenate([prompt.tiles for prompt in prompts]), lengths)
print("mixture layers:", model.config.text.moe_layers)
x_TD, expert_T = layers[0]
print(f"each hears {x_TD.dtype}{list(x_TD.shape)}, divided over {x_TD.sharding.spec[0]!r}: {lengths.sum()} tokens, the rest padding")

# %% [markdown]
# ## The send/receive matrix
#
# Four questions lie on each device. A token on device *s* whose expert lies on device *r* travels from *s* to *r*, and its
# result travels back. The framed tokens find their expert at home. Padding travels nowhere.

# %%
LAYER = 3
x_TD, expert_T = layers[model.config.text.moe_layers.index(LAYER)]
experts = model.text.layers[LAYER].feed_forward.experts.weights

expert = np.asarray(expert_T)
L = len(expert) // N  # tokens of one device, padding included
sender = np.arange(len(expert)) // L
real = expert < E
matrix = np.zeros((N, N), int)
np.add.at(matrix, (sender[real], expert[real] // (E // N)), 1)

figure, axis = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
image = axis.imshow(matrix, cmap="Blues", vmin=0)
for s in range(N):
    for r in range(N):
        axis.text(r, s, matrix[s, r], ha="center", va="center", color="white" if matrix[s, r] > matrix.max() / 2 else "black")
    axis.add_patch(Rectangle((s - 0.5, s - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2))
axis.set(xticks=range(N), yticks=range(N), xlabel="receiver: the device of the expert", ylabel="sender: the device of the question")
axis.set_title(f"tokens from device to device, layer {LAYER}")
figure.colorbar(image, label="tokens")
plt.show()

maverick = mj.Config.maverick().text
token_bytes = maverick.hidden_size * jnp.dtype(jnp.bfloat16).itemsize
travelling = int(matrix.sum() - np.trace(matrix))
layer_megabytes = travelling * token_bytes / 1e6
print(f"{matrix.sum()} tokens: {np.trace(matrix)} stay, {travelling} travel")
print(f"a token of Maverick takes {token_bytes:,} B to its expert and as many back, in bfloat16")
print(f"for a batch like this that is {layer_megabytes:.1f} MB each way in a layer,")
print(f"and {2 * layer_megabytes * len(maverick.moe_layers):.0f} MB there and back in its {len(maverick.moe_layers)} mixture layers")

# %% [markdown]
# ## Load imbalance
#
# The router sends a token to the expert with the highest score. Nothing in it makes the shares even.

# %%
load_E = np.bincount(expert[real], minlength=E)
load_N = matrix.sum(axis=0)

figure, (expert_axis, device_axis) = plt.subplots(1, 2, figsize=(12, 3.4), layout="constrained", width_ratios=(3, 1))
order = np.argsort(-load_E, kind="stable")
expert_axis.bar(range(E), load_E[order], width=0.9, color=[COLOURS[e // (E // N)] for e in order])
expert_axis.set(xlabel="experts, the busiest first, in the colour of their device", title="tokens per expert", xlim=(-1, E))
device_axis.bar(range(N), load_N, color=COLOURS[:N])
device_axis.set(xlabel="device", title="tokens per device", xticks=range(N))
for axis, load in ((expert_axis, load_E), (device_axis, load_N)):
    axis.set_ylabel("tokens")
    axis.axhline(load.mean(), color="black", linestyle="--", linewidth=1, label=f"mean {load.mean():.1f}")
    axis.legend()
plt.show()

print("layer   experts without a token   busiest expert / mean   busiest device / mean")
for layer, (_, layer_expert_T) in zip(model.config.text.moe_layers, layers, strict=True):
    found_E = np.bincount(np.asarray(layer_expert_T), minlength=E + 1)[:E]
    found_N = found_E.reshape(N, -1).sum(axis=1)
    print(f"{layer:5}   {(found_E == 0).sum():23}   {found_E.max() / found_E.mean():21.1f}   {found_N.max() / found_N.mean():21.2f}")

# %% [markdown]
# A layer is done when its busiest device is. Part of the imbalance is of the questions' own making: all begin with the same
# tokens, which go to the same experts. And digits need few experts: about half of the 128 get nothing.

# %%
at_start = expert.reshape(len(prompts), -1)
alike = int((at_start == at_start[0]).all(axis=0).argmin())
print(f"the first {alike} tokens go to experts {at_start[0, :alike].tolist()} in each of the {len(prompts)} questions")

# %% [markdown]
# ## Three dispatchers, one answer
#
# * `Local`: no token travels to an expert. Every device gathers all tokens, applies the experts it holds, and the results are
#   summed over the devices. Simple, and wasteful with many tokens.
# * `AllToAll`: every device sends every other a buffer of fixed size. Fixed shapes run on CPU, GPU and TPU.
# * `Ragged`: every device sends exactly the tokens that go there. For TPU; on a CPU it is imitated.
#
# The same tokens and weights go through each, and through `Local` on one device, which needs no dispatch at all.

# %%
one_device, _ = jax.jit(Local())(*jax.device_get((x_TD, expert_T, experts)))
one_device = np.asarray(one_device, np.float32)
print(f"results up to {np.abs(one_device).max():.1f}; greatest difference from one device:")


def compare(dispatcher):
    """Greatest difference from one device, and tokens dropped."""
    y_TD, stats = jax.jit(dispatcher)(x_TD, expert_T, experts)
    return np.abs(np.asarray(y_TD, np.float32) - one_device).max(), int(stats.dropped)


for dispatcher in (Local, AllToAll, Ragged):
    difference, dropped = compare(dispatcher(mesh, THROUGHPUT))
    print(f"{dispatcher.__name__:8}  difference = {difference}  dropped = {dropped}")

# %% [markdown]
# ## When the buffer is small
#
# `AllToAll` gives each receiver room for `capacity_factor` times an even share of a device's tokens. What does not fit goes in
# a further round, until nothing is left: this is how inference never drops a token. The largest entry of the matrix says how
# many rounds that takes. Small buffers carry less padding, large ones need fewer rounds.
#
# Training must fix the number of rounds, for gradients cannot pass a loop of unknown length. A token left over then gets
# nothing from its expert (the shared expert and the residual stream still carry it), and the dispatcher reports it.

# %%
print("capacity factor   rows per buffer   rounds   rows sent   tokens among them   after one round: dropped   difference")
for factor in (0.5, 1.0, 2.0, 4.0):
    capacity = math.ceil(factor * L / N)
    rounds = math.ceil(matrix.max() / capacity)
    rows = N * (N - 1) * capacity * rounds
    difference, dropped = compare(AllToAll(mesh, THROUGHPUT, capacity_factor=factor, rounds=1))
    assert dropped == np.maximum(matrix - capacity, 0).sum()  # what the matrix says
    print(f"{factor:15}   {capacity:15}   {rounds:6}   {rows:9,}   {travelling / rows:17.0%}   {dropped:24}   {difference:10.1f}")

difference, dropped = compare(AllToAll(mesh, THROUGHPUT, capacity_factor=0.5))
print(f"\ncapacity factor 0.5 until nothing is left: difference = {difference}  dropped = {dropped}")

# %% [markdown]
# ## A plan for v6e-64
#
# Maverick itself has 400 billion parameters. What it would need and could do on 64 TPU v6e chips follows from its sizes and
# the chip's data sheet; no TPU is needed to ask. The speeds are limits: they assume that nothing is slower than the hardware
# allows, and an even load. `maverick plan --topology v6e:8x8` prints the same.

# %%
plan = make_plan(mj.Config.maverick(), topology="v6e:8x8")
print(plan)

# %%
with tempfile.TemporaryDirectory() as folder:
    save_plot(plan, Path(folder) / "plan.png", model="maverick")
    display(Image(filename=Path(folder) / "plan.png"))
