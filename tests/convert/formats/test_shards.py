"""Which files of a directory are the model: what the index says, one file, or shards that are all there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maverick_jax.convert import convert, inspect, open_source
from maverick_jax.convert.formats.shards import INDEX, SINGLE
from oracle.other_tools import load_tensors, replace_tensors


@pytest.fixture
def source(maverick, tmp_path) -> Path:
    """A checkpoint in three shards."""
    directory = shutil.copytree(maverick.source, tmp_path / "source")
    return replace_tensors(directory, load_tensors(directory), shards=3)


def same(source, maverick) -> bool:
    ours, theirs = open_source(source), open_source(maverick.source)
    whole = {name: (slice(None),) * len(shape) for name, (shape, _) in theirs.parameters.items()}
    return all(ours.read(name, index).tobytes() == theirs.read(name, index).tobytes() for name, index in whole.items())


@pytest.mark.parametrize("stale", [SINGLE, "consolidated.safetensors"])
def test_the_index_wins_over_other_files(source, maverick, stale):
    """Of a fine-tune saved over its base model one file is left, and of some releases a second copy in another spelling."""
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_tensors(source).items()}, source / stale)
    assert same(source, maverick)
    note = (f"left out, for they are no part of the model: {stale}.",)
    assert open_source(source).notes == inspect(source).notes == note


def test_an_index_of_files_that_are_gone_does_not_hide_the_one_that_is_there(source, maverick):
    tensors = load_tensors(source)
    for file in source.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, source / SINGLE)
    assert same(source, maverick)


def test_half_an_index_is_an_unfinished_download(source, refused):
    """One file too many must not make up for one that is missing."""
    save_file(load_tensors(source), source / SINGLE)
    (source / "model-00002-of-00003.safetensors").unlink()
    with refused(f"{INDEX} names model-00002-of-00003.safetensors, which is not there: fetch what is missing."):
        open_source(source)


def test_shards_without_an_index_are_read_if_all_are_there(source, maverick, tmp_path):
    (source / INDEX).unlink()
    assert same(source, maverick)
    assert convert(source, tmp_path / "out", progress=False).notes == ()


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_the_shard_that_is_missing_is_named(source, refused, lost):
    (source / INDEX).unlink()
    (source / f"model-0000{lost}-of-00003.safetensors").unlink()
    with refused(f"source has no {INDEX} and 2 of 3 shards, without model-0000{lost}-of-00003.safetensors: fetch what is missing."):
        open_source(source)


def test_a_number_of_shards_that_nobody_has_takes_no_time(source, refused):
    for number, file in enumerate(sorted(source.glob("*.safetensors")), 1):
        file.rename(source / f"model-{number}-of-{10**40}.safetensors")
    (source / INDEX).unlink()
    with refused(f"source has no {INDEX} and 3 of {10**40} shards, without model-{'4'.zfill(41)}-of-"):
        open_source(source)


def test_shards_of_two_checkpoints_are_not_mixed(source, refused):
    (source / INDEX).unlink()
    shutil.copyfile(source / "model-00001-of-00003.safetensors", source / "model-00001-of-00002.safetensors")
    with refused(f"source has no {INDEX}, and shards of several checkpoints, model-*-of-00002, model-*-of-00003: fetch the index too."):
        open_source(source)


def test_a_tensor_in_two_shards_without_an_index_is_refused(source, refused):
    (source / INDEX).unlink()
    shutil.copyfile(source / "model-00001-of-00003.safetensors", source / "model-00002-of-00003.safetensors")
    with refused(" is in model-00001-of-00003.safetensors and in ...model-00002-of-00003.safetensors: fetch both again."):
        open_source(source)


def test_a_single_file_of_another_name_is_not_guessed_at(source, refused):
    tensors = load_tensors(source)
    for file in source.glob("model*"):
        file.unlink()
    save_file(tensors, source / "scout.safetensors")
    with refused(f"source has scout.safetensors but no {INDEX}: if one file is the whole model, call it {SINGLE}."):
        open_source(source)


def test_a_file_that_differs_in_the_case_of_its_name_is_named(source, refused):
    """Unpacked where names have no case, and copied to where they have."""
    (source / "model-00002-of-00003.safetensors").rename(source / "Model-00002-of-00003.safetensors")
    with refused("names model-00002-of-00003.safetensors, which is not there under that name, but as Model-00002-of-00003.safetensors: "):
        open_source(source)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "shards/model.safetensors", "", "."])
def test_an_index_names_files_beside_it(source, refused, name):
    values = json.loads((source / INDEX).read_text())
    first = next(iter(values["weight_map"]))
    values["weight_map"][first] = name
    (source / INDEX).write_text(json.dumps(values))
    with refused(INDEX):
        open_source(source)
