"""How the adapter with which the demo begins was made: `python -m maverick_jax.training.demo.base OUT`.

The mini model knows one handwritten digit per picture; this teaches it what numbers and bars look like, and stops while there is something
left to learn.
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
LENGTH = 64  # tokens of a row
OPTIMIZATION = Optimization(1800, 4e-3, "linear")
STEPS = 1500  # where it stops: about 0.7 of the questions are answered right then


def base(out: Path) -> Llama4:
    """The mini model with its adapter; `out` gets the run."""
    directory = mini_directory()
    reading = reading_of(directory, Config.from_directory(directory))
    model = load(directory, dtype="float32", training=True)
    add_adapters(model, RANKS, scale=SCALE, seed=0)
    rows = Conversations(examples(questions(QUESTIONS, BASE_SEED), reading), reading, LENGTH, packing=False)
    data, loop = Batches(rows, Order(Settings().rows)), Loop(progress=True, stop=lambda step, record: step == STEPS)
    return train(model, NextToken(), data, OPTIMIZATION, out, identity={"stage": "base"}, loop=loop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="directory of the adapter")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as run:
        model = base(Path(run, "run"))
        thin = nnx.state(model, nnx.LoRAParam)
        nnx.update(model, jax.tree.map(lambda matrix: matrix.astype(jnp.bfloat16), thin))
        model.directory = "maverick_jax/assets/mini"  # by which the adapter names its base, wherever it was made
        save_adapter(model, args.out)


if __name__ == "__main__":
    main()
