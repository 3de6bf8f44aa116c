"""What `maverick inspect` shows."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from maverick_jax.convert import convert, inspect, open_source, table
from maverick_jax.convert.build.estimate import estimate
from maverick_jax.convert.proof.verify import verify


def test_both_kinds_of_directory_have_the_same_totals(case):
    source, converted = inspect(case.source), inspect(case.converted)
    assert source.parameters == converted.parameters == sum(tensor.size for tensor in case.tensors.values())
    assert source.bytes == converted.bytes == 2 * source.parameters


def test_entries_are_those_of_transformers(maverick):
    entries = {entry.parameter: entry for entry in inspect(maverick.source).entries}
    assert {name: entry.shape for name, entry in entries.items()} == {name: tensor.shape for name, tensor in maverick.tensors.items()}
    assert {entry.dtype for entry in entries.values()} == {"bfloat16"}


def test_the_table_is_aligned_and_ends_with_totals(maverick):
    lines = table(maverick.converted).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["parameter", "shape", "dtype", "bytes"]
    gate = next(line for line in lines if line.startswith("text.layers.1.feed_forward.experts.gate"))
    assert gate.split()[1:] == ["8", "x", "160", "x", "96", "bfloat16", "245,760"]
    assert lines[-1].split()[0] == str(len(inspect(maverick.converted).entries))


def test_layers_are_in_numeric_order(tmp_path):
    save_file({f"layers.{i}.weight": np.zeros(1, np.float32) for i in (10, 9, 2)}, tmp_path / "model.safetensors")
    assert [entry.parameter for entry in inspect(tmp_path).entries] == ["layers.2.weight", "layers.9.weight", "layers.10.weight"]


def test_what_is_left_out_of_metas_names_is_told_too(two_ranks, tmp_path):
    """As of a Hugging Face directory, and as `convert` tells it."""
    directory = shutil.copytree(two_ranks, tmp_path / "two")
    for file in directory.glob("*.pth"):
        torch.save({f"module.{name}": tensor for name, tensor in torch.load(file, weights_only=False).items()}, file)
    assert inspect(directory).notes == open_source(directory).notes == ("names are read without module., which other tools put into them.",)
    assert {entry.parameter.split(".")[2] for entry in inspect(directory).entries} == {"module"}
    assert inspect(two_ranks).notes == ()


def test_results_are_shown_in_a_line(maverick, tmp_path):
    """In a notebook the last value of a cell is shown; a model has a thousand tensors."""
    shown = [repr(inspect(maverick.source)), repr(estimate(maverick.source, tmp_path / "out")), repr(verify(maverick.converted))]
    shown.append(repr(convert(maverick.source, tmp_path / "out")))
    assert not [text for text in shown if "\n" in text or len(text) > 250]
    assert [text[1:].split()[0] for text in shown] == ["Inventory", "Estimate", "Report:", "Summary"]


def test_the_dict_is_json(case):
    values = json.loads(json.dumps(inspect(case.converted).as_dict()))
    assert values["tensors"][0].keys() == {"parameter", "shape", "dtype", "bytes"}
    assert values["bytes"] == sum(tensor["bytes"] for tensor in values["tensors"])


def test_weights_are_not_read(maverick, monkeypatch):
    """The table of a 400B model has to come at once."""
    from maverick_jax.convert import ModelDirectory
    from maverick_jax.convert.formats import tensor_file

    monkeypatch.setattr(tensor_file.os, "preadv", lambda *_: pytest.fail("read weights"))
    monkeypatch.setattr(ModelDirectory, "read", lambda *_: pytest.fail("read weights"))
    table(maverick.source), table(maverick.converted)


def test_quantized_weights_are_counted_as_weights(maverick, tmp_path):
    """Two to a byte, and scales are none."""
    convert(maverick.source, tmp_path / "model", target="int4", progress=False)
    assert inspect(tmp_path / "model").parameters == inspect(maverick.source).parameters
