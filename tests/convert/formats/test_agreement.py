"""Counts of a config are held against the files before any model is described, which alone may take all memory and all day."""

import json
import shutil
from pathlib import Path

import pytest

from maverick_jax import checkpoint
from maverick_jax.convert import convert, export, open_model_directory, open_source
from maverick_jax.convert.formats import names
from oracle.other_tools import load_tensors, replace_tensors, take_apart

MANY = 1000  # layers: more than the files have, and no more than a config may say


@pytest.fixture
def describes_nothing(monkeypatch):
    """What is refused here must be refused without a model, abstract as it may be."""
    for module in (names, checkpoint):
        monkeypatch.setattr(module, "get_abstract_model", lambda *_, **__: pytest.fail("described the model"))


def say(directory: Path, part: str, **values) -> Path:
    """Change a part of `config.json`; lists of layers follow from other fields."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    inside = config.get(part, config)
    for name in ("no_rope_layers", "moe_layers", "layer_types"):
        inside.pop(name, None)
    inside.update(values)
    file.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(("variant", "layers"), [("maverick", MANY), ("text_only", MANY), ("maverick", 3)])
@pytest.mark.parametrize("kind", ["source", "converted"])
def test_layers_of_the_text_are_counted(cases, tmp_path, describes_nothing, refused, variant, layers, kind):
    directory = shutil.copytree(getattr(cases[variant], kind), tmp_path / kind)
    say(directory, "text_config", num_hidden_layers=layers)
    uses = [checkpoint.load, *((lambda d: convert(d, tmp_path / "out", progress=False),) if kind == "source" else (open_model_directory,))]
    for use in uses:
        with refused(
            f"{kind} has 4 text layers, the config asks for {layers:,}: config and weights belong to different models: fetch both"
        ):
            use(directory)
    if kind == "converted":
        with refused(f"{kind} has 4 text layers, the config asks for {layers:,}"):
            export(directory, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("kind", ["source", "converted"])
def test_so_are_those_of_the_vision_tower(maverick, tmp_path, describes_nothing, refused, kind):
    directory = say(shutil.copytree(getattr(maverick, kind), tmp_path / kind), "vision_config", num_hidden_layers=MANY)
    with refused(f"{kind} has 1 vision layer, the config asks for 1,000"):
        checkpoint.load(directory)


@pytest.mark.parametrize("field", ["n_layers", "vision_args"])
def test_so_are_those_of_pth_files(two_ranks, tmp_path, describes_nothing, refused, field):
    source = shutil.copytree(two_ranks, tmp_path / "source")
    params = json.loads((source / "params.json").read_text())
    params |= {"n_layers": MANY} if field == "n_layers" else {"vision_args": params["vision_args"] | {"n_layers": MANY}}
    (source / "params.json").write_text(json.dumps(params))
    with refused(f"source has {'4 text layers' if field == 'n_layers' else '1 vision layer'}, the config asks for 1,000"):
        open_source(source)


def test_a_layer_that_was_not_fetched_is_named(maverick, tmp_path, describes_nothing, refused):
    tensors = {name: tensor for name, tensor in load_tensors(maverick.source).items() if ".layers.2." not in name}
    source = replace_tensors(shutil.copytree(maverick.source, tmp_path / "source"), tensors)
    with refused("source has 3 text layers, but no text layer 2, the config asks for 4"):
        open_source(source)


def test_a_text_model_with_the_whole_models_config_is_told_by_the_count(maverick, tmp_path, describes_nothing, refused):
    """All its names are right: to call them unexpected would mislead."""
    tensors = {name: tensor for name, tensor in load_tensors(maverick.source).items() if name.startswith("language_model.")}
    source = replace_tensors(shutil.copytree(maverick.source, tmp_path / "source"), tensors)
    with refused("source has 0 vision layers, the config asks for 1: config and weights belong to different models"):
        open_source(source)


def test_where_no_layer_is_named_as_ours_names_are_shown(maverick, tmp_path, describes_nothing, refused):
    tensors = {f"transformer.h.{i}.attn.weight": tensor for i, tensor in enumerate(load_tensors(maverick.source).values())}
    source = replace_tensors(shutil.copytree(maverick.source, tmp_path / "source"), tensors)
    layers = ", ".join(f"language_model.model.layers.{i}.*" for i in range(3))
    with refused(f"source lacks {layers}, and has the unexpected transformer.h.0.attn.weight, ... more: config and weights"):
        open_source(source)


@pytest.mark.parametrize("experts", [65_536, 4])
def test_experts_one_by_one_are_counted(maverick, tmp_path, describes_nothing, refused, experts):
    """A name for each of them would be as many as the config says."""
    source = replace_tensors(shutil.copytree(maverick.source, tmp_path / "source"), take_apart(load_tensors(maverick.source)))
    say(source, "text_config", num_local_experts=experts)
    with refused(f"source has 8 routed experts, the config asks for {experts:,}: config and weights belong to different models"):
        open_source(source)


def test_ranks_are_counted_by_their_files(two_ranks, tmp_path, refused):
    """A file of rank 99,999,999,999 must not make a list of all that are missing."""
    source = shutil.copytree(two_ranks, tmp_path / "source")
    (source / "consolidated.01.pth").rename(source / "consolidated.99999999999.pth")
    with refused("source lacks the file of rank 1 (consolidated.*.pth): fetch it too."):
        open_source(source)
