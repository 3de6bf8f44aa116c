"""Tiny checkpoints of transformers on disk, and what we make of them."""

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest

from maverick_jax.assets import mini_directory
from maverick_jax.convert import convert
from maverick_jax.errors import UserError

if TYPE_CHECKING:
    import torch

SMALL = {"text": {"num_hidden_layers": 4}, "vision": {"num_hidden_layers": 1}}
VARIANTS = {
    "maverick": lambda make_config: make_config("maverick", **SMALL),
    "scout": lambda make_config: make_config("scout", **SMALL),
    "text_only": lambda make_config: make_config("maverick", **SMALL).text_config,
}
WIDE = {  # every head and width divides among 8 ranks
    "text": {"num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8},
    "vision": {"num_hidden_layers": 1, "num_attention_heads": 8},
}
RAM, ENOUGH = Path("/dev/shm"), 1 << 28


class Case:
    """A model of transformers, its checkpoint in shards, and our conversion of that."""

    def __init__(self, variant: str, directory: Path):
        from oracle import tiny_checkpoints

        self.model = tiny_checkpoints.make_model(VARIANTS[variant](tiny_checkpoints.make_config))
        self.source, self.converted = directory / "source", directory / "converted"
        with warnings.catch_warnings():  # torch's, about a buffer of transformers
            warnings.simplefilter("ignore")
            tiny_checkpoints.save_checkpoint(self.model, self.source)
        for name in ("tokenizer.json", "chat_template.jinja"):
            shutil.copyfile(mini_directory() / name, self.source / name)
        (self.source / "USE_POLICY.md").write_text("be good")
        (self.source / "README.md").write_text("not ours to copy")
        convert(self.source, self.converted, progress=False)

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """transformers' own tensors; float32 that is exact in bfloat16."""
        return {name: tensor.numpy() for name, tensor in self.model.state_dict().items()}


@pytest.fixture(scope="session")
def scratch_disk(tmp_path_factory) -> Iterator[Path]:
    """In memory where there is room, else without syncs: those of the 400 files of a tiny checkpoint take a disk three seconds."""
    if not os.access(RAM, os.W_OK) or shutil.disk_usage(RAM).free < ENOUGH:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: None)
            yield tmp_path_factory.mktemp("convert")
        return
    with tempfile.TemporaryDirectory(dir=RAM, prefix="maverick-tests-") as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path(scratch_disk) -> Iterator[Path]:
    """pytest's, on our disk, and removed at once."""
    folder = Path(tempfile.mkdtemp(dir=scratch_disk))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def module_path(scratch_disk) -> Iterator[Path]:
    """A folder for what the tests of a module share."""
    folder = Path(tempfile.mkdtemp(dir=scratch_disk))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def cases(scratch_disk) -> dict[str, Case]:
    return {variant: Case(variant, scratch_disk / variant) for variant in VARIANTS}


@pytest.fixture(params=list(VARIANTS))
def case(request, cases) -> Case:
    return cases[request.param]


@pytest.fixture
def maverick(cases) -> Case:
    return cases["maverick"]


class Release(NamedTuple):
    """A model of transformers, its Hugging Face checkpoint, and our conversion of that."""

    model: "torch.nn.Module"
    huggingface: Path
    converted: Path


@pytest.fixture(scope="session")
def release(scratch_disk) -> Release:
    from oracle import tiny_checkpoints

    model = tiny_checkpoints.make_model(tiny_checkpoints.make_config("maverick", **WIDE))
    found = Release(model, scratch_disk / "wide", scratch_disk / "wide-converted")
    with warnings.catch_warnings():  # torch's, about a buffer of transformers
        warnings.simplefilter("ignore")
        tiny_checkpoints.save_checkpoint(model, found.huggingface)
    convert(found.huggingface, found.converted, progress=False)
    return found


@pytest.fixture(scope="session")
def two_ranks(release, scratch_disk) -> Path:
    """The same model in two of Meta's files."""
    from oracle.meta_checkpoints import save_meta_checkpoint

    return save_meta_checkpoint(release.model, scratch_disk / "two-ranks", ranks=2)


@contextlib.contextmanager
def _refused(message: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    with pytest.raises(UserError) as error:
        yield error
    text, at = str(error.value), 0
    assert "\n" not in text
    for part in message.split("..."):
        assert part in text[at:], text
        at = text.index(part, at)


@pytest.fixture(scope="session")
def refused() -> Callable[[str], contextlib.AbstractContextManager[pytest.ExceptionInfo[UserError]]]:
    """`with refused(message)`: a `UserError` of one line in which every part of `message`, split at `...`, appears in order."""
    return _refused
