"""Tiny checkpoints of transformers on disk, and what we make of them."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from maverick_jax.convert import convert
from oracle import tiny_checkpoints

SMALL = {"text": {"num_hidden_layers": 4}, "vision": {"num_hidden_layers": 1}}
VARIANTS = {
    "maverick": lambda: tiny_checkpoints.make_config("maverick", **SMALL),
    "scout": lambda: tiny_checkpoints.make_config("scout", **SMALL),
    "text_only": lambda: tiny_checkpoints.make_config("maverick", **SMALL).text_config,
}


class Case:
    """A model of transformers, its checkpoint in shards, and our conversion of that."""

    def __init__(self, variant: str, directory: Path):
        self.model = tiny_checkpoints.make_model(VARIANTS[variant]())
        self.source, self.converted = directory / "source", directory / "converted"
        with warnings.catch_warnings():  # torch's, about a buffer of transformers
            warnings.simplefilter("ignore")
            tiny_checkpoints.save_checkpoint(self.model, self.source)
        (self.source / "tokenizer.json").write_text("{}")
        (self.source / "USE_POLICY.md").write_text("be good")
        (self.source / "README.md").write_text("not ours to copy")
        convert(self.source, self.converted, progress=False)

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """transformers' own tensors; float32 that is exact in bfloat16."""
        return {name: tensor.numpy() for name, tensor in self.model.state_dict().items()}


@pytest.fixture(scope="session")
def cases(tmp_path_factory) -> dict[str, Case]:
    return {variant: Case(variant, tmp_path_factory.mktemp(variant)) for variant in VARIANTS}


@pytest.fixture(params=list(VARIANTS))
def case(request, cases) -> Case:
    return cases[request.param]


@pytest.fixture
def maverick(cases) -> Case:
    return cases["maverick"]
