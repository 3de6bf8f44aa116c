"""Does our model compute with a model directory what transformers computes with the checkpoint? Stage by stage, in float32.

Both sides run their own modules with weights that are read when the computation reaches them, so memory does not grow with the
model. Each goes on with its own values, so errors add up as they do in use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from maverick_jax.convert.build.model_directory import ModelDirectory, open_model_directory
from maverick_jax.convert.formats.agreement import compare_names
from maverick_jax.convert.formats.names import weights
from maverick_jax.convert.formats.recognize import open_source
from maverick_jax.convert.proof.compare.ours import Ours
from maverick_jax.convert.proof.compare.stages import State, make_prompt
from maverick_jax.errors import UserError

# Of the largest magnitude of a token's vector. Float32 sums in another order: 4e-6 after 8 layers, 2e-5 after the 48 of the releases
# (tiny widths; a layer of the releases' widths adds no more). The least fault of our tests, a wrong row of one expert, makes 1e-2.
TOLERANCE = 1e-4


class Row(NamedTuple):
    """A stage of ours beside the reference's.

    Attributes:
      error: the largest difference.
      largest: the largest magnitude of the reference.
      relative: of the tokens' largest difference over the reference's largest magnitude in that token, the largest.
      routing: the share of tokens that both routers send to the same expert; None where there are none.
    """

    stage: str
    error: float
    largest: float
    relative: float
    routing: float | None

    @classmethod
    def of(cls, ours: State, reference: State) -> Row:
        assert (ours.stage, ours.values.shape) == (reference.stage, reference.values.shape)
        pairs = zip(ours.values, reference.values, strict=True)  # token by token: no copies of the logits
        with np.errstate(invalid="ignore"):  # infinite minus infinite
            error_T, largest_T = np.array([(np.abs(a - b).max(), np.abs(b).max()) for a, b in pairs]).T
        routing = None
        if ours.expert_T is not None:
            routing = float((ours.expert_T == reference.expert_T).mean())
        relative = (error_T / np.maximum(largest_T, np.finfo(np.float32).tiny)).max()
        return cls(ours.stage, float(error_T.max()), float(largest_T.max()), float(relative), routing)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row per stage, in the order of the computation."""

    rows: tuple[Row, ...]

    @property
    def worst(self) -> Row:
        """The stage with the largest relative error."""
        return max(self.rows, key=lambda row: math.inf if math.isnan(row.relative) else row.relative)

    @property
    def agrees(self) -> bool:
        """Whether no stage's relative error is above `TOLERANCE`.

        Relative to the token's own largest magnitude, because what reads a hidden state divides it by its root mean square first: a
        difference counts by the size of the vector that it is in. With one scale for all, a token a thousand times as large as
        the others would hide what is wrong with these.
        """
        return all(row.relative <= TOLERANCE for row in self.rows)  # false for what is no number

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"agrees": self.agrees, "tolerance": TOLERANCE, "stages": [row._asdict() for row in self.rows]}

    def as_table(self) -> str:
        """Aligned columns, a line per stage."""
        head = ("stage", "max error", "largest", "relative", "same expert")
        body = [
            (r.stage, f"{r.error:.1e}", f"{r.largest:.3g}", f"{r.relative:.1e}", "" if r.routing is None else f"{r.routing:.1%}")
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = ["  ".join([f"{s:<{widths[0]}}", *(f"{n:>{w}}" for n, w in zip(ns, widths[1:], strict=True))]) for s, *ns in (head, *body)]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def compare(model_dir: str | Path, source_dir: str | Path, *, progress: bool = True) -> Comparison:
    """Run a prompt with a picture through our model and through transformers', and compare what they hold after every stage.

    Each side goes on with its own values, so errors add up as in use. Only where rounding decides between two experts does the
    reference take ours. Where the model directory's weights are not the checkpoint's own, but quantized or rounded, the table says
    what that does.

    Args:
      model_dir: a finished model directory.
      source_dir: the Hugging Face directory that it was made from: bfloat16, or the official FP8.
      progress: show a bar on stderr, if that is a terminal.

    Raises:
      UserError: PyTorch or transformers is not installed, or the directories are none of the above, or of different models.
    """
    source_dir = Path(source_dir)
    if any(source_dir.glob("*.pth")) and not any(source_dir.glob("*.safetensors")):
        raise UserError(
            f"{source_dir} holds Meta's .pth files: comparing with transformers takes a Hugging Face directory of the same model."
        )
    try:
        from maverick_jax.convert.proof.compare.reference import Reference
    except ImportError as error:
        raise UserError(f"comparing with transformers takes PyTorch: pip install 'maverick-jax[torch]' transformers ({error}).") from error
    model = open_model_directory(model_dir)
    _refuse_another_model(model, source_dir)
    prompt = make_prompt(model.config)
    ours = Ours(model)
    reference = Reference(source_dir, prefer=lambda: ours.dispatcher.expert_T)
    sides = zip(ours.run(prompt), reference.run(prompt), strict=True)  # a stage of ours, then the same of theirs
    stages = model.config.text.num_hidden_layers + 2 + (prompt.tiles is not None)
    bar = tqdm(sides, "against transformers", stages, unit="stage", disable=None if progress else True, dynamic_ncols=True)
    with _on_cpu():
        return Comparison(tuple(Row.of(*pair) for pair in bar))


def _refuse_another_model(model: ModelDirectory, source_dir: Path) -> None:
    configs = (model.config, open_source(source_dir).config)
    ours, theirs = ({name: weight.shape for name, weight in weights(config).items()} for config in configs)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            shapes = f"{name} is {ours.get(name, 'missing')} in the one and {theirs.get(name, 'missing')} in the other"
            raise UserError(f"{model.directory} and {source_dir} are different models: {shapes}.")
    compare_names(model.directory, {re.sub(r"\.(values|scales)$", "", name) for name in model.parameters}, ours)


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """Where float32 products are float32 products, and the host's memory is the device's."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError(f"the comparison runs on the CPU, which JAX_PLATFORMS leaves out ({error}): unset it.") from error
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        yield
