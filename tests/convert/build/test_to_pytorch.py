"""Export gives back, bit for bit, what was converted."""

import json
import shutil

import pytest
import torch

from maverick_jax.checkpoint import load, save
from maverick_jax.convert import convert, export
from maverick_jax.convert.build import to_pytorch
from maverick_jax.convert.formats import places
from maverick_jax.errors import UserError


def load_files(directory) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, read by the safetensors library."""
    from safetensors.torch import load_file

    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(directory, other) -> None:
    ours, theirs = load_files(directory), load_files(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def test_a_round_trip_changes_no_bit(case, tmp_path):
    export(case.converted, tmp_path / "exported", progress=False)
    assert_same_tensors(tmp_path / "exported", case.source)
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "USE_POLICY.md"}
    assert {file.name for file in (tmp_path / "exported").iterdir()} == files
    assert (tmp_path / "exported/config.json").read_bytes() == (case.source / "config.json").read_bytes()


def test_shards_and_their_index_agree(maverick, tmp_path, monkeypatch):
    """Small shards and blocks: every file within the limit, or one tensor; the index as transformers reads it."""
    monkeypatch.setattr(to_pytorch, "SHARD", 1_000_000)
    monkeypatch.setattr(places, "BLOCK", 1 << 14)
    out = export(maverick.converted, tmp_path / "exported", progress=False)
    assert_same_tensors(out, maverick.source)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 4
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in load_files(out).values())
    convert(out, tmp_path / "again", progress=False)


def test_transformers_loads_the_export(maverick, tmp_path):
    """Its own loader finds every tensor and no other."""
    from transformers import Llama4ForConditionalGeneration

    export(maverick.converted, tmp_path / "exported", progress=False)
    model, report = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "exported", dtype=torch.float32, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in maverick.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_mixed_dtypes_survive(maverick, tmp_path):
    """Norms in float32, as some fine-tunes store them."""
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(maverick.source, tmp_path / "source")
    for file in source.glob("*.safetensors"):
        tensors = {name: tensor.float() if "norm" in name else tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    convert(source, tmp_path / "converted", progress=False)
    export(tmp_path / "converted", tmp_path / "exported", progress=False)
    assert_same_tensors(tmp_path / "exported", source)
    assert {tensor.dtype for tensor in load_files(source).values()} == {torch.bfloat16, torch.float32}


def test_a_saved_model_exports(maverick, tmp_path):
    """Fine-tuned models are saved by Orbax itself, not by the converter."""
    save(load(maverick.converted), tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "exported", progress=False)
    assert_same_tensors(tmp_path / "exported", maverick.source)


def test_leftovers_of_an_interrupted_export_do_not_get_in(maverick, tmp_path):
    partial = tmp_path / "exported.partial"
    partial.mkdir()
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"old")
    export(maverick.converted, tmp_path / "exported", progress=False)
    assert [file.name for file in (tmp_path / "exported").glob("*.safetensors")] == ["model.safetensors"]


def test_weights_of_another_config_are_refused(maverick, cases, tmp_path):
    directory = shutil.copytree(maverick.converted, tmp_path / "mixed")
    shutil.copyfile(cases["scout"].converted / "config.json", directory / "config.json")
    with pytest.raises(UserError, match="belong to different models"):
        export(directory, tmp_path / "exported", progress=False)


@pytest.mark.parametrize("change", [{"vocab_size": 1017}, {"num_hidden_layers": 3, "moe_layers": [1]}, {"num_hidden_layers": 5}])
@pytest.mark.parametrize("target", [None, "bfloat16", "float32"])
def test_a_config_that_does_not_fit_is_refused(maverick, tmp_path, change, target):
    """A smaller one would leave weights out without a word."""
    directory = shutil.copytree(maverick.converted, tmp_path / "model")
    values = json.loads((directory / "config.json").read_text())
    values["text_config"] |= change
    (directory / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"model:? .*(belong to different models|asks for)"):
        export(directory, tmp_path / "exported", target=target, progress=False)
    assert not list(tmp_path.glob("exported*"))


def test_what_is_not_of_an_export_is_kept(maverick, tmp_path):
    """The unfinished conversion of another model under the same name."""
    (tmp_path / "exported.partial/params").mkdir(parents=True)
    with pytest.raises(UserError, match=r"exported\.partial holds params, which is of something else"):
        export(maverick.converted, tmp_path / "exported", progress=False)
    assert (tmp_path / "exported.partial/params").is_dir()


def test_a_save_that_was_killed_is_no_obstacle(maverick, tmp_path):
    (tmp_path / "saved.partial/params/state").mkdir(parents=True)
    (tmp_path / "saved.partial/params.orbax-checkpoint-tmp-1").mkdir()
    save(load(maverick.converted), tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} >= {"params", "manifest.json"}
    assert not list((tmp_path / "saved").glob("*tmp*"))


def test_a_directory_that_was_copied_in_part_is_named(maverick, tmp_path):
    """By `load`, before Orbax says it in thousands of lines, and by `export`."""
    directory = shutil.copytree(maverick.converted, tmp_path / "model")
    file = next((directory / "params/state/text.norm/c").iterdir())
    for damage in (lambda: file.write_bytes(b"short"), file.unlink):
        damage()
        with pytest.raises(UserError, match=r"a part of text\.norm, is missing or cut short: copy or convert"):
            load(directory)
        with pytest.raises(UserError, match=r"a part of text\.norm, is missing or cut short: copy or convert"):
            export(directory, tmp_path / "exported", progress=False)
