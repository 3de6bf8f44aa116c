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
# # Serving many: one engine, requests that come and go
#
# `generate`, `Chat` and `maverick batch` are callers of one `Engine`. This notebook turns it by hand, with the embedded mini model on one
# device: who computes what in each turn, which pages of the cache belong to whom, what a prompt gains that begins like an earlier one,
# and what drafts are worth. It needs no network and no accelerator.

# %%
import io
import json

import matplotlib.pyplot as plt
import numpy as np

import maverick_jax as mj
from maverick_jax.inference.scheduling.plans import Plan

model = mj.load()
tokenizer = mj.Tokenizer.from_directory(model.directory)
COLOURS = plt.colormaps["tab10"].colors
print(model)
print("tokens per chunk:", model.config.text.attention_chunk_size, " layers that see everything:", model.config.text.nope_layers)

# %% [markdown]
# ## Eight requests, turn by turn
#
# Four slots, and few pages for the two layers that see everything: 12 pages of 32 tokens. `trace` gets a line of JSON for everything that
# the scheduler is told and plans. A turn, `engine.step()`, plans and launches, and then reads what the turn before has drawn.
#
# A new request comes every second turn; the third is cancelled in turn 12.

# %%
trace = io.StringIO()
engine = mj.Engine(model, slots=4, max_length=256, pages=12, reuse=False, trace=trace)
engine.warm_up(extras=False, progress=False)
trace.truncate(trace.seek(0))
print(engine)

random = np.random.default_rng(0)
prompts = [random.integers(4, 300, tokens).tolist() for tokens in (20, 150, 60, 8, 90, 40, 25, 12)]
handles, arrived = [], []
turn = 0
while len(handles) < len(prompts) or not all(handle.finish for handle in handles):
    if turn % 2 == 0 and len(handles) < len(prompts):
        handles.append(engine.submit(mj.Request(ids=prompts[len(handles)], max_new_tokens=24, stop_ids=())))
        arrived.append(turn)
    if turn == 12:
        handles[2].cancel()
    engine.step()
    turn += 1
print(*handles, sep="\n")

# %% [markdown]
# The same tokens come out when each is served alone:

# %%
alone = mj.Engine(model, slots=1, max_length=256)
differing = 0
for prompt, handle in zip(prompts, handles, strict=True):
    (one,) = alone.run([mj.Request(ids=prompt, max_new_tokens=24, stop_ids=())])
    differing += one.tokens[: handle.new_tokens] != handle.tokens
print("requests that say something else alone:", differing)

# %% [markdown]
# ## The timeline
#
# A row per request. Whoever is up to date decodes, a token per turn; prompts are read beside that in pieces, cut at the borders of chunks
# (32 tokens here). A request waits while there is no slot for it, or no page; where pages run out, the youngest gives back
# its own, and is computed again later.

# %%
plans = [Plan.from_json(json.dumps(event["plan"])) for event in map(json.loads, trace.getvalue().splitlines()) if "plan" in event]
figure, axis = plt.subplots(figsize=(11, 3.6), layout="constrained")
served = {}
for turn, plan in enumerate(plans):
    for call in plan.calls:
        for part in call.parts:
            served.setdefault(part.row, []).append(turn)
            axis.barh(part.row, 1, left=turn, color=COLOURS[0] if call.kind == "decode" else COLOURS[1], edgecolor="white", linewidth=0.5)
            if call.kind == "prefill":
                axis.text(turn + 0.5, part.row, part.length, ha="center", va="center", fontsize=6, color="white")
    for row in plan.preempted:
        axis.plot(turn, row, marker="x", color="red", markersize=8)
for row, turns in served.items():
    axis.barh(row, turns[0] - arrived[row], left=arrived[row], color="lightgray")
for label, colour in (("waits", "lightgray"), ("prefill, tokens", COLOURS[1]), ("decode", COLOURS[0])):
    axis.barh(0, 0, color=colour, label=label)
axis.plot([], [], "x", color="red", linestyle="none", label="gives back its pages")
axis.set(xlabel="turn", ylabel="request", yticks=range(len(prompts)), xlim=(0, len(plans)))
axis.invert_yaxis()
axis.legend(loc="upper right", fontsize=8)
plt.show()

# %% [markdown]
# ## Slots and pages
#
# Above, who has which slot: there it has a buffer of one chunk per RoPE layer. Below, who has which page of the layers that
# see everything: as many as its tokens need so far, and none for the length that it might reach.

# %%
slot_owner = np.full((engine.limits.slots, len(plans)), np.nan)
page_owner = np.full((engine.limits.pages, len(plans)), np.nan)
tables = {}  # (slot, stretch of tokens) -> page
for turn, plan in enumerate(plans):
    for slot, stretch, page in plan.table_changes:
        tables[slot, stretch] = page
    for call in plan.calls:
        for part in call.parts:
            slot_owner[part.slot, turn] = part.row
            for stretch in range(-(-(part.start + part.length) // engine.limits.page)):
                page_owner[tables[part.slot, stretch], turn] = part.row

figure, axes = plt.subplots(2, 1, figsize=(11, 4.4), layout="constrained", height_ratios=(1, 2.4), sharex=True)
for axis, owner, name in zip(axes, (slot_owner, page_owner), ("slot", "page"), strict=True):
    axis.pcolormesh(owner, cmap="tab10", vmin=0, vmax=9, edgecolors="white", linewidth=0.3)
    axis.set_ylabel(name)
axes[1].set_xlabel("turn; colours are requests")
for row in range(len(prompts)):
    axes[0].plot([], [], "s", color=COLOURS[row], label=row)
axes[0].legend(ncols=8, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

held = np.isfinite(page_owner).sum(axis=0)
reserved = np.isfinite(slot_owner).sum(axis=0) * -(-engine.limits.max_length // engine.limits.page)
print(f"pages in use at once: {held.max()} of {engine.limits.pages}; reserved at full length the same requests would take {reserved.max()}")

# %% [markdown]
# ## What a known beginning saves
#
# Twenty requests in a row have the same 700 tokens of instructions, and a few of their own. What the first one computed is still
# there for the others: `cached_tokens` of them are not computed again, which shows in the time to the first token.

# %%
instructions = random.integers(4, 300, 700).tolist()
questions = [random.integers(4, 300, 12).tolist() for _ in range(20)]


def first_tokens(reuse):
    """Milliseconds to each request's first token, and how many tokens were there."""
    engine = mj.Engine(model, slots=1, max_length=1024, reuse=reuse)
    engine.warm_up(extras=False, progress=False)
    handles = [engine.run([mj.Request(ids=[*instructions, *question], max_new_tokens=2, stop_ids=())])[0] for question in questions]
    return [1000 * handle.seconds["prefill"] for handle in handles], [handle.cached_tokens for handle in handles]


with_reuse, cached = first_tokens(reuse=True)
without, _ = first_tokens(reuse=False)
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
axis.plot(without, "o", color=COLOURS[1], label="each reads everything")
axis.plot(with_reuse, "o", color=COLOURS[0], label="the beginning is known")
axis.set(xlabel="request", ylabel="time to first token, ms", ylim=(0, None), xticks=range(0, len(questions), 2))
axis.legend()
plt.show()
print(f"tokens that were there: {cached[0]} for the first, {cached[1]} of {len(instructions) + len(questions[1])} for the second")
print(f"time to first token, median: {np.median(without):.1f} ms, and {np.median(with_reuse[1:]):.1f} ms with a known beginning")

# %% [markdown]
# ## What drafts are worth
#
# With `draft=4` a step computes up to four tokens more than it must: those that stood behind the same words before, in the prompt
# or in the answer. The model says to each whether it would have said the same; the tokens are the same with and without. It
# is worth it where a text repeats itself, so here is a text that does, and one that does not.

# %%
texts = {
    "repeats itself": [tokenizer.encode("What is the sum? The sum is 7. " * 4 + "What is")],
    "random tokens": [random.integers(4, 300, 60).tolist()],
}
figure, axis = plt.subplots(figsize=(8, 2.2), layout="constrained")
for place, (name, (prompt,)) in enumerate(texts.items()):
    request = mj.Request(ids=prompt, max_new_tokens=48, stop_ids=())
    (plain,) = mj.Engine(model, slots=1, max_length=256).run([request])
    engine = mj.Engine(model, slots=1, max_length=256, draft=4)
    (drafted,) = engine.run([request])
    assert drafted.tokens == plain.tokens
    found = engine.drafted
    axis.barh(place, found.proposed, color="lightgray", label="proposed" if place == 0 else None)
    axis.barh(place, found.accepted, color=COLOURS[0], label="accepted" if place == 0 else None)
    print(f"{name:15} {found.steps} steps had a draft; {found.accepted} of {found.proposed} tokens accepted ({found.rate:.0%})")
axis.set(yticks=range(len(texts)), yticklabels=texts, xlabel="tokens of drafts, for 48 tokens of an answer")
axis.invert_yaxis()
axis.legend()
plt.show()
