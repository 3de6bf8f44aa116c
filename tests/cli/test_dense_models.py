"""The commands with a model that has no experts and one table for both ends."""

import dataclasses
import json
from pathlib import Path

import pytest
from flax import nnx

from maverick_jax.assets import mini_directory
from maverick_jax.checkpoint import save
from maverick_jax.config import Config
from maverick_jax.model import Llama4


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """The mini model's sizes and tokenizer, with random weights."""
    mini = Config.from_directory(mini_directory())
    text = dataclasses.replace(
        mini.text, moe_layers=(), num_local_experts=0, num_hidden_layers=2, nope_layers=(1,), tie_word_embeddings=True
    )
    model = Llama4(Config(text=text, eos_token_id=()), rngs=nnx.Rngs(0))
    return save(model, tmp_path_factory.mktemp("dense") / "model", companions=mini_directory())


def test_generate_plan_and_inspect(maverick, dense):
    """Nothing of a table of experts without rows is a traceback: on the default mesh, with `--json`, in a plan."""
    found = maverick("generate", "-m", dense, "--max-new-tokens", 3, "--json", "hello")
    assert found.status == 0, found.err
    assert json.loads(found.out)["text"]
    plan = maverick("plan", "-m", dense, "--topology", "v6e:1x1", "--batch", 2, "--context", 64)
    assert plan.status == 0, plan.err
    assert "experts" not in plan.out
    assert maverick("inspect", dense).out.count("unembedding") == 0


def test_a_billion_layers_are_no_reason_to_wait(maverick, dense, tmp_path):
    """Refused from the config alone, by every command that reads one."""
    values = Config.from_directory(dense).to_huggingface() | {"num_hidden_layers": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for arguments in (
        ("plan", "-m", tmp_path, "--topology", "v6e:1x1"),
        ("generate", "-m", tmp_path, "hello"),
        ("convert", tmp_path, tmp_path / "o"),
    ):
        found = maverick(*arguments)
        assert (found.status, found.out) == (2, "")
        assert "num_hidden_layers is 1000000000: it must be a whole number from 1 to 1,024." in found.err
        assert found.err.count("\n") == 1
