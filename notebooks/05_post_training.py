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
# # Post-training: from a base through filter, SFT, RL and DPO
#
# The whole of post-training with the embedded mini model, on processors and without a network: questions about drawn pictures, a filter
# that keeps what is hard, supervised fine-tuning, GRPO on the model's own answers, DPO, and beside each stage a control that differs in one
# thing. It is `maverick train demo`, taken apart. The default settings take 12 minutes of two cores.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display

import maverick_jax as mj
from maverick_jax.assets import demo_adapter, mini_directory
from maverick_jax.cli.train.plots import save_plots
from maverick_jax.training.data.files import reading_of
from maverick_jax.training.demo import pipeline, report, tasks
from maverick_jax.training.demo.settings import Settings
from maverick_jax.training.rollouts.rewards import exact
from maverick_jax.training.rollouts.sampling import draw

settings = Settings()
print(settings)

# %% [markdown]
# ## The questions
#
# Each is drawn from its number and a seed, so that there are as many as one likes and none is asked twice: numbers of two and three digits,
# bars, pictures of any proportions, with noise. The base is the mini model with an adapter (LoRA, experts included) that has learned these
# tasks in part.

# %%
base = mj.load(mini_directory(), dtype="float32", adapter=demo_adapter())
reading = reading_of(mini_directory(), base.config)
engine = mj.Engine(base, slots=settings.slots, max_length=settings.length)
questions = tasks.questions(10, seed=100)
prompts = tasks.prompts(questions, reading)
groups = list(draw(engine, prompts, reading, count=8, max_new_tokens=settings.answer, seed=0))

figure, axes = plt.subplots(2, 5, figsize=(12, 5), layout="constrained")
for axis, question, answers in zip(axes.flat, questions, groups, strict=True):
    axis.imshow(question.picture, cmap="gray", vmin=0, vmax=255)
    axis.set_title(f"{question.text}\n{answers[0].text}", fontsize=9, color="black" if answers[0].text == question.answer else "firebrick")
    axis.axis("off")
plt.show()

# %% [markdown]
# ## A group of answers
#
# To each question several answers are drawn. How many are right says how hard it is, which is what the filter goes by. For GRPO their
# worth, less the group's mean and over its deviation, is the advantage that every token of an answer has: where all are worth the
# same there is none, and nothing to learn.

# %%
for prompt, answers in zip(prompts, groups, strict=True):
    worth = np.array([exact(answer.text, prompt.line) for answer in answers])
    if 0 < worth.mean() < 1:
        break
advantage = (worth - worth.mean()) / worth.std(ddof=1)
print(prompt.line["messages"][0]["content"][-1]["text"])
for answer, value, more in zip(answers, worth, advantage, strict=True):
    print(f"{answer.text:24} reward {value:.0f}  advantage {more:+.2f}  log-probability {answer.logprob_A.sum():6.2f}")

# %% [markdown]
# ## The stages
#
# | stage | what it has | its control |
# |---|---|---|
# | filter | eight answers of the base to each question of a pool | |
# | SFT | right answers to the hard ones of one half | to as many at random |
# | RL | GRPO on the other half's questions that are answered right neither always nor never | on all of that half, for as long |
# | DPO | a right and a wrong answer of its own to a question | the RL stage before it |
#
# All models answer the same held-out questions. A comparison counts those that only one of two models answers right, and asks McNemar's
# exact test whether that many more is more than chance.

# %%
with tempfile.TemporaryDirectory() as folder:
    found = pipeline.run(Path(folder) / "demo", settings, told=print)
    save_plots(found, Path(folder) / "report.png")
    picture = Image(filename=Path(folder) / "report.png")
print()
print(report.table([found]))

# %%
display(picture)

# %% [markdown]
# ## What the filter saw
#
# How many of eight answers the base has right. At the right is what SFT leaves out, and at both ends what RL leaves out.

# %%
passes = np.array(found["filter"]["passes"])
figure, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
axis.bar(*np.unique(passes, return_counts=True), color="steelblue")
axis.set(xlabel=f"right answers of {settings.group}", ylabel="questions")
plt.show()
print(f"questions of the pool that are always right: {np.mean(passes == settings.group):.0%}, never: {np.mean(passes == 0):.0%}")

# %% [markdown]
# What three seeds say, and what did not work, is in `docs/training.md`. The same stages on files of your own:
#
# ```
# maverick train filter questions.jsonl hard -m DIR --reward exact
# maverick train sft hard/kept.jsonl sft -m DIR
# maverick train rl questions.jsonl rl -m DIR --adapter sft/adapter --reward exact
# maverick train dpo pairs.jsonl dpo -m DIR --adapter rl/adapter
# maverick serve -m DIR --adapter dpo/adapter
# ```
