"""What quantized weights cost in accuracy: errors of weights and logits of tiny random models, answers of the mini model.

    JAX_PLATFORMS=cpu python benchmarks/quantization_error.py

From a checkout: the tiny models are the tests' own. Everything is converted by `maverick convert`'s code and computed in float32,
so that what is measured is the rounding of the weights, of activations where they are named,
and nothing else. Needs the `test` extra; takes some minutes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

import maverick_jax as mj
from maverick_jax.assets import mini_directory
from maverick_jax.convert import convert, open_model_directory, open_source
from maverick_jax.convert.build.steps import multiply_out
from maverick_jax.model.parameter import Sides
from maverick_jax.model.quantized import COMPONENTS
from maverick_jax.ops.quantize import FORMATS
from maverick_jax.prompt import Tokenizer
from maverick_jax.training.mini.evaluate import accuracy

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from oracle.forward import text_ids
from oracle.pair import picture_prompt
from oracle.tiny_checkpoints import make_config, make_model, save_checkpoint

EXPERT = "text.layers.3.feed_forward.experts.gate"
CHOICES: dict[str, Collection[str]] = {"experts": ("experts",), "all four": COMPONENTS}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = {"mini": mini_directory()}
        for variant in ("maverick", "scout"):
            sources[variant] = save_checkpoint(make_model(make_config(variant)), Path(folder, variant))
        print("| format | quantized | weights | Maverick: logits | same token | Scout: logits | same token | mini model: right |")
        print("|---|---|---|---|---|---|---|---|")
        exact = {variant: logits(sources[variant]) for variant in ("maverick", "scout")}
        print(f"| bfloat16 | | | | | | | {right(sources['mini']):.1%} |", flush=True)
        for form in FORMATS:
            for name, components in CHOICES.items():
                made = {model: Path(folder, f"{model}-{form}-{len(components)}") for model in sources}
                for model, out in made.items():
                    convert(sources[model], out, target=form, quantize=components, progress=False)
                for activations in (None, "fp8") if (form, name) == ("fp8", "experts") else (None,):
                    cells = [form, f"{name}, and activations" if activations else name]
                    cells.append(f"{weight_error(sources['mini'], made['mini']):.2%}")
                    for variant, expected in exact.items():
                        cells += off(logits(made[variant], activations), expected)
                    print(f"| {' | '.join(cells)} | {right(made['mini'], activations):.1%} |", flush=True)


def off(found: np.ndarray, expected: np.ndarray) -> list[str]:
    """The median, since where rounding sends a token to another expert, its logits are others altogether; and equal likeliest tokens."""
    error = np.median(np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1))
    same = (found.argmax(axis=-1) == expected.argmax(axis=-1)).mean()
    return [f"{error:.2%}", f"{same:.1%}"]


def weight_error(source: Path, made: Path) -> float:
    """Root mean square error of an expert stack, of its own root mean square."""
    exact, model = open_source(source), open_model_directory(made)
    whole = (slice(0, None),) * 3
    found = multiply_out(model.read(f"{EXPERT}.values", whole), model.read(f"{EXPERT}.scales", whole), Sides(1, 1)).astype(np.float32)
    weight = exact.read(EXPERT, whole).astype(np.float32)
    return float(np.linalg.norm(found - weight) / np.linalg.norm(weight))


def logits(directory: Path, activations: str | None = None) -> np.ndarray:
    """Of four rows of text and of a prompt with two pictures, a row per token."""
    model = mj.load(directory, dtype="float32", activations=activations)
    ids, tiles = picture_prompt()
    rows = [np.asarray(model(text_ids(4, 53))), np.asarray(model(ids, tiles))]
    return np.concatenate([row.reshape(-1, row.shape[-1]) for row in rows])


def right(directory: Path, activations: str | None = None) -> float:
    """Held-out questions that the model answers right, of 512."""
    model = mj.load(directory, dtype="float32", activations=activations)
    return accuracy(model, Tokenizer.from_directory(directory))["all"]


if __name__ == "__main__":
    main()
