"""An adapter in use: merged into what is exported, and beside the weights in an engine."""

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

import maverick_jax as mj
from maverick_jax.adapter import save_adapter
from maverick_jax.assets import digits
from maverick_jax.cli.main import main
from maverick_jax.errors import UserError
from maverick_jax.model.low_rank import add_adapters
from oracle.adapted import RANKS, teach
from oracle.forward import logits, text_ids

MERGED = 1e-5
IDS = text_ids(2, 12) % 300


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The mini model as a model directory in float32."""
    return mj.save(mj.load(dtype="float32"), tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapted(base):
    model = mj.load(base)
    add_adapters(model, RANKS, scale=0.2)
    teach(model)
    return model


@pytest.fixture(scope="module")
def adapter(adapted, base) -> Path:
    return save_adapter(adapted, base.parent / "adapter")


def test_merged_weights_are_the_sum(base, adapter, adapted, tmp_path, capsys):
    """To 1e-5 of a weight's size, and the same answers."""
    assert main(["export", str(base), str(tmp_path / "merged"), "--merge", str(adapter), "--quiet"]) == 0
    assert main(["export", str(base), str(tmp_path / "plain"), "--quiet"]) == 0
    merged, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "plain"))
    changed = {name for name, array in plain.items() if not np.array_equal(array, merged[name])}
    assert all("norm" not in name and "embed" not in name.replace("patch_embedding", "") for name in changed)
    assert len(changed) > 70
    assert_allclose(logits(mj.load(tmp_path / "merged"), IDS), logits(adapted, IDS), atol=1e-4, rtol=0)
    query = "language_model.model.layers.0.self_attn.q_proj.weight"
    weight = adapted.text.layers[0].attention.query
    rank = weight.a.shape[-1]
    product = np.asarray(weight.a[...]) @ np.asarray(weight.b[...]).reshape(rank, -1)
    summed = np.asarray(weight.base[...]).reshape(product.shape) + 0.2 * product
    assert_allclose(merged[query].T, summed, atol=MERGED, rtol=0)
    down, experts = "language_model.model.layers.1.feed_forward.experts.down_proj", adapted.text.layers[1].feed_forward.experts.down
    summed = np.asarray(experts.base[...]) + 0.2 * np.asarray(experts.a[...]) @ np.asarray(experts.b[...])
    assert_allclose(merged[down], summed, atol=MERGED, rtol=0)


def test_the_base_is_as_it_was(base, adapter, tmp_path):
    """Training and merging leave no trace in it: exported, it is the mini model's own file but for the dtype."""
    mj.export_checkpoint(base, tmp_path / "plain")
    original = mj.load(dtype="float32")
    exported = mj.load(tmp_path / "plain", dtype="float32")
    assert_array_equal(logits(exported, IDS), logits(original, IDS))


def test_a_quantized_base_must_be_multiplied_out(adapter, tmp_path):
    """Nothing can be added to 8 bits; multiplied out it can."""
    mj.convert_checkpoint(mj.load().directory, tmp_path / "int8", target="int8")
    with pytest.raises(UserError, match=r"experts\.\w+ is quantized, and nothing can be added to it: export with --format bfloat16"):
        mj.export_checkpoint(tmp_path / "int8", tmp_path / "out", merge=adapter)
    assert not (tmp_path / "out").exists()
    mj.export_checkpoint(tmp_path / "int8", tmp_path / "out", merge=adapter, target="float32")
    model = mj.load(tmp_path / "int8", adapter=adapter, dtype="float32")
    assert_allclose(logits(mj.load(tmp_path / "out"), IDS), logits(model, IDS), atol=1e-3, rtol=0)


def test_an_engine_answers_with_it(base, adapter, adapted, tmp_path):
    """Prefill, decode, pictures: the tokens of the merged model."""
    mj.export_checkpoint(base, tmp_path / "merged", merge=adapter)
    prompts = [row.tolist() for row in text_ids(3, 40, 1) % 300]
    expected = mj.generate(mj.load(tmp_path / "merged"), prompts, max_new_tokens=12, stop_ids=())
    assert mj.generate(mj.load(base, adapter=adapter), prompts, max_new_tokens=12, stop_ids=()) == expected


def test_on_the_command_line(base, tmp_path, capsys):
    """`--adapter` of every command that loads a model; what is none is one line."""
    model = mj.load(base)
    add_adapters(model, RANKS, scale=30.0)
    teach(model)
    adapter = save_adapter(model, tmp_path / "strong")
    picture = tmp_path / "digit.png"
    digits.picture(digits.held_out()[0][0]).save(picture)
    one = ["--mesh", "expert=1", "--dtype", "float32"]
    command = ["generate", *one, "--image", str(picture), "--image", str(picture), "--max-new-tokens", "8", "What is the sum?"]
    assert main([*command, "--adapter", str(adapter)]) == 0
    with_adapter = capsys.readouterr().out
    assert main(command) == 0
    assert with_adapter != capsys.readouterr().out
    assert main([*command, "--adapter", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("is no adapter of PEFT: it has no adapter_config.json.")


def test_a_model_with_an_adapter_is_not_saved_as_a_base(adapted, tmp_path):
    """Its weights would have other names."""
    with pytest.raises(UserError, match="has an adapter: `save_adapter` saves it"):
        mj.save(adapted, tmp_path / "out")
