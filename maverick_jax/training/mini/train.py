"""Train the embedded mini model on scikit-learn's handwritten digits: `python -m maverick_jax.training.mini.train OUT`.

Shape suffixes: B batch, T tokens, N pictures, S pixels.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import trange

from maverick_jax.assets import digits
from maverick_jax.checkpoint import load, save
from maverick_jax.config import Config
from maverick_jax.convert import export
from maverick_jax.model import Llama4
from maverick_jax.ops.linear import linear
from maverick_jax.prompt import Tokenizer, render, tile_image
from maverick_jax.training.mini.definition import CHAT_TEMPLATE, mini_config, mini_tokenizer
from maverick_jax.training.mini.evaluate import accuracy

HELD_OUT = 360  # pictures that are never trained on
LENGTH = 40  # tokens of a padded example
BATCH = 48
LEARNING_RATE = 2e-3


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """[1797, 8, 8] uint8 ink and labels, in a fixed random order; the last `HELD_OUT` are held out."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return (pixels[order].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8), labels[order].astype(np.int32)


def shifted(pictures: np.ndarray) -> np.ndarray:
    """[N, 8, 8] -> [9 N, 8, 8]: as they are, and moved by one pixel each way."""
    moves = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1)))
    return np.concatenate([padded[:, 1 + y : 9 + y, 1 + x : 9 + x] for y, x in moves])


class Batch(NamedTuple):
    """Examples to learn from."""

    ids_BT: np.ndarray  # int32, prompt and answer, right-padded
    lengths_B: np.ndarray  # int32
    is_answer_BT: np.ndarray  # where the next token belongs to the answer
    tiles_N3SS: np.ndarray  # float32, two pictures per row
    digit_N: np.ndarray  # int32


class Examples:
    """Random questions about random pairs of training pictures."""

    def __init__(self, config: Config, tokenizer: Tokenizer, pictures: np.ndarray, labels: np.ndarray, seed: int = 0):
        assert config.vision is not None
        moved = shifted(pictures)
        self.tiles = np.stack([tile_image(digits.picture(p), config.vision)[0][0] for p in moved])
        self.labels = np.tile(labels, 9)
        self.random = np.random.default_rng(seed)
        self.end_of_turn = tokenizer.id_of("<|eot|>")
        blank = digits.picture(pictures[0])
        self.prompts = [render(digits.messages(q, blank, blank), tokenizer, config).token_ids for q in digits.QUESTIONS]
        self.answers = {
            (q, left, right): [*tokenizer.encode(digits.answer(question, left, right)), self.end_of_turn]
            for q, question in enumerate(digits.QUESTIONS)
            for left in range(10)
            for right in range(10)
        }

    def batch(self, size: int) -> Batch:
        """`size` random examples."""
        ids = np.zeros((size, LENGTH), np.int32)
        is_answer = np.zeros((size, LENGTH), bool)
        lengths = np.zeros(size, np.int32)
        chosen = self.random.integers(len(self.tiles), size=(size, 2))
        for row, (left, right) in enumerate(chosen):
            question = int(self.random.integers(len(digits.QUESTIONS)))
            prompt = self.prompts[question]
            reply = self.answers[question, int(self.labels[left]), int(self.labels[right])]
            lengths[row] = len(prompt) + len(reply)
            ids[row, : lengths[row]] = prompt + reply
            is_answer[row, len(prompt) - 1 : lengths[row] - 1] = True
        pictures = chosen.reshape(-1)
        return Batch(ids, lengths, is_answer, self.tiles[pictures], self.labels[pictures])


def loss(model: Llama4, probe_DC: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of the answers' tokens, and the same plus that of a linear probe which names each picture's digit.

    The probe gives the vision tower a signal before the decoder has learned to look at pictures.
    """
    features = model.encode_tiles(batch.tiles_N3SS)
    digit_NC = linear(features.reshape(len(batch.digit_N), -1, features.shape[-1]).mean(axis=1), probe_DC)
    seeing = optax.softmax_cross_entropy_with_integer_labels(digit_NC, batch.digit_N).mean()
    is_patch = batch.ids_BT == model.config.image_token_index
    index_BT = jnp.cumsum(is_patch.reshape(-1)).reshape(batch.ids_BT.shape) - 1
    x_BTD, _, _ = model.hidden(model.embed(batch.ids_BT, features, index_BT), batch.lengths_B)
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(model.logits(x_BTD), jnp.roll(batch.ids_BT, -1, axis=1))
    answering = jnp.where(batch.is_answer_BT, losses_BT, 0).sum() / batch.is_answer_BT.sum()
    return answering + seeing, answering


def train(steps: int) -> tuple[Llama4, dict]:
    """A trained model in float32 and its tokenizer.json."""
    description = mini_tokenizer()
    config, tokenizer = mini_config(description), Tokenizer(description)
    pictures, labels = load_digits()
    examples = Examples(config, tokenizer, pictures[:-HELD_OUT], labels[:-HELD_OUT])
    graphdef, state = nnx.split(Llama4(config, dtype="float32", rngs=nnx.Rngs(0)))
    learned = (state, jnp.zeros((config.text.hidden_size, 10)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))
    moments = optimizer.init(learned)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(learned, moments, batch):
        gradients, answering = jax.grad(lambda both: loss(nnx.merge(graphdef, both[0]), both[1], batch), has_aux=True)(learned)
        updates, moments = optimizer.update(gradients, moments, learned)
        return optax.apply_updates(learned, updates), moments, answering

    with trange(steps, desc="training") as bar:
        for _ in bar:
            learned, moments, answering = step(learned, moments, examples.batch(BATCH))
            bar.set_postfix(loss=f"{float(answering):.4f}")
    state, _ = learned
    return nnx.merge(graphdef, state), description


def save_huggingface(model: Llama4, description: dict, out: Path) -> None:
    """Write the trained model as what a user would bring: safetensors in bfloat16, config, tokenizer and chat template."""
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), state))
    eos = list(model.config.eos_token_id)
    files = {
        "tokenizer.json": description,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot|>",
            "pad_token": "<|finetune_right_pad|>",
            "model_max_length": model.config.text.max_position_embeddings,
        },
        "generation_config.json": {
            "bos_token_id": model.config.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": model.config.pad_token_id,
        },
    }
    with tempfile.TemporaryDirectory() as directory:
        companions = Path(directory, "companions")
        companions.mkdir()
        for name, content in files.items():
            (companions / name).write_text(json.dumps(content, indent=1) + "\n")
        (companions / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        export(save(model, Path(directory, "model"), companions=companions), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="Hugging Face directory to make")
    parser.add_argument("--steps", type=int, default=1500, metavar="N", help="training steps (default: 1500, about 12 minutes on 2 cores)")
    args = parser.parse_args()
    model, description = train(args.steps)
    save_huggingface(model, description, args.out)
    for question, fraction in accuracy(load(args.out), Tokenizer(description)).items():
        print(f"{fraction:6.1%}  {question}")


if __name__ == "__main__":
    main()
