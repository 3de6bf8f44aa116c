"""How the adapter with which the demo begins was made: `python -m maverick_jax.training.demo.base OUT`.

The mini model knows one handwritten digit per picture; this teaches it what numbers and bars look like, and stops half way.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from maverick_jax.adapter import save_adapter
from maverick_jax.assets import mini_directory
from maverick_jax.checkpoint import load
from maverick_jax.config import Config
from maverick_jax.model import Llama4
from maverick_jax.model.low_rank import add_adapters
from maverick_jax.training.data.files import reading_of
from maverick_jax.training.data.pipeline import Batches, Order
from maverick_jax.training.data.rows import Conversations
from maverick_jax.training.demo.pipeline import BASE_SEED
from maverick_jax.training.demo.settings import Settings
from maverick_jax.training.demo.tasks import examples, questions
from maverick_jax.training.next_token import NextToken
from maverick_jax.training.optimization import Optimization
from maverick_jax.training.trainer import Loop, train

RANKS = {"attention": 16, "dense": 16, "shared": 16, "experts": 2, "vision": 16}
SCALE = 2.0
QUESTIONS = 30_000
LEARNING_RATE = 4e-3


def base(steps: int, out: Path) -> Llama4:
    """The mini model with its adapter, which `steps` steps of supervised training made; `out` gets the run."""
    settings, directory = Settings(), mini_directory()
    reading = reading_of(directory, Config.from_directory(directory))
    model = load(directory, dtype="float32", training=True)
    add_adapters(model, RANKS, scale=SCALE, seed=0)
    rows = Conversations(examples(questions(QUESTIONS, BASE_SEED), reading), reading, settings.length, packing=False)
    optimization = Optimization(steps, LEARNING_RATE, "linear")
    return train(model, NextToken(), Batches(rows, Order(settings.rows)), optimization, out, identity={}, loop=Loop(progress=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="directory of the adapter")
    parser.add_argument("--steps", type=int, default=1800, metavar="N", help="training steps (default: 1800)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as run:
        model = base(args.steps, Path(run, "run"))
        thin = nnx.state(model, nnx.LoRAParam)
        nnx.update(model, jax.tree.map(lambda matrix: matrix.astype(jnp.bfloat16), thin))
        model.directory = "maverick_jax/assets/mini"  # by which the adapter names its base, wherever it was made
        save_adapter(model, args.out)


if __name__ == "__main__":
    main()
