"""Routed experts stored one by one in plain numbers: the same model as with stacks, to the file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx

from maverick_jax.checkpoint import load
from maverick_jax.convert import convert, export, open_source
from maverick_jax.convert.build.estimate import estimate
from maverick_jax.convert.build.writer import Writer
from maverick_jax.convert.proof.compare import compare
from maverick_jax.convert.proof.verify import verify
from maverick_jax.sharding import make_mesh
from oracle.other_tools import load_tensors, replace_tensors, take_apart

VARIANTS = ("maverick", "text_only")
STACK = "text.layers.1.feed_forward.experts.gate"
EXPERT = "language_model.model.layers.1.feed_forward.experts.{}.gate_proj.weight"


def like(case, directory: Path, change=lambda tensors: tensors, **options) -> Path:
    """A copy of a checkpoint whose experts are taken apart, and its tensors then changed."""
    shutil.copytree(case.source, directory)
    return replace_tensors(directory, change(take_apart(load_tensors(directory), **options)))


@pytest.fixture(scope="module")
def apart(cases, module_path) -> dict[str, Path]:
    return {variant: like(cases[variant], module_path / variant) for variant in VARIANTS}


def files_of(directory: Path) -> dict[str, bytes]:
    """Path -> content of everything below `params/`."""
    params = directory / "params"
    return {str(file.relative_to(params)): file.read_bytes() for file in params.rglob("*") if file.is_file()}


def everything(source) -> dict[str, bytes]:
    return {name: source.read(name, (slice(None),) * len(shape)).tobytes() for name, (shape, _) in source.parameters.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_result_is_that_of_the_stacks_to_the_file(cases, apart, tmp_path, variant):
    """A matrix that was not turned, or an expert in another's place, is a model that answers nonsense."""
    summary = convert(apart[variant], tmp_path / "out", progress=False)
    assert summary.kind == "Hugging Face, experts one by one"
    assert files_of(tmp_path / "out") == files_of(cases[variant].converted)


@pytest.mark.parametrize("target", ["fp8", "int8", "int4"])
def test_so_is_a_quantized_result(maverick, apart, tmp_path, target):
    for source, out in ((apart["maverick"], "apart"), (maverick.source, "stacked")):
        convert(source, tmp_path / out, target=target, progress=False)
    assert files_of(tmp_path / "apart") == files_of(tmp_path / "stacked")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_half_and_single_precision_are_read_as_they_are(maverick, tmp_path, dtype):
    """What is not bfloat16 must not be taken for it."""

    def cast(tensors):
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    stacked = replace_tensors(shutil.copytree(maverick.source, tmp_path / "stacked"), cast(load_tensors(maverick.source)))
    one, two = open_source(like(maverick, tmp_path / "apart", cast)), open_source(stacked)
    assert {str(found) for _, found in one.parameters.values()} == {str(dtype).removeprefix("torch.")}
    assert one.parameters == two.parameters
    assert everything(one) == everything(two)


def test_chunks_of_several_experts_and_of_a_part_of_one(maverick, apart, tmp_path, monkeypatch):
    """A chunk of ours may hold several of their tensors, and a device's share any part of them."""
    monkeypatch.setattr("maverick_jax.convert.formats.tensor_file.SCRATCH", 64)
    one, whole = open_source(apart["maverick"]), open_source(maverick.source)
    random = np.random.default_rng(0)
    for part in ("gate", "up", "down"):
        name = f"text.layers.1.feed_forward.experts.{part}"
        for _ in range(8):
            starts = [int(random.integers(0, size)) for size in whole.parameters[name][0]]
            ends = [int(random.integers(start + 1, size + 1)) for start, size in zip(starts, whole.parameters[name][0], strict=True)]
            index = tuple(map(slice, starts, ends))
            assert one.read(name, index).tobytes() == whole.read(name, index).tobytes(), (name, index)


def test_layers_may_differ(maverick, tmp_path):
    """Compressors leave the layers alone that they were told to."""
    source = like(maverick, tmp_path / "mixed", where=lambda name: ".layers.3." in name)
    convert(source, tmp_path / "out", progress=False)
    assert files_of(tmp_path / "out") == files_of(maverick.converted)


def test_an_interrupted_conversion_goes_on(maverick, apart, tmp_path, monkeypatch):
    """What the journal notes are our chunks, whatever tensors they came from."""
    write, left = Writer.write, iter(range(50))

    def stop(self, *args):
        if next(left, None) is None:
            raise RuntimeError("stopped")
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            convert(apart["maverick"], tmp_path / "out", progress=False, workers=1)
    assert convert(apart["maverick"], tmp_path / "out", progress=False).resumed > 0
    assert files_of(tmp_path / "out") == files_of(maverick.converted)


def test_dry_run_counts_the_same_bytes(maverick, apart, tmp_path):
    one, stacked = estimate(apart["maverick"], tmp_path / "out"), estimate(maverick.source, tmp_path / "out")
    for field in ("bytes_read", "bytes_written", "parameters", "tensors", "transforms"):
        assert getattr(one, field) == getattr(stacked, field), field


def test_verify_and_the_way_back(maverick, apart, tmp_path):
    """The manifest names each expert's tensor; exported, they are the stacks that transformers loads."""
    convert(apart["maverick"], tmp_path / "out", progress=False)
    assert verify(tmp_path / "out", apart["maverick"], progress=False).problems == []
    made_from = json.loads((tmp_path / "out/manifest.json").read_text())["tensors"][STACK]["from"]
    assert {key.partition(":")[2] for key in made_from} == {EXPERT.format(e) for e in range(8)}
    export(tmp_path / "out", tmp_path / "back", progress=False)
    back, original = load_tensors(tmp_path / "back"), load_tensors(maverick.source)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


def test_a_mesh_gets_the_same_arrays(maverick, apart):
    """Each device reads the matrices of its own experts, and a part of each where the tensor axis divides them."""
    mesh = make_mesh(expert=4, tensor=2)
    one, stacked = (nnx.to_flat_state(nnx.state(load(source, mesh=mesh))) for source in (apart["maverick"], maverick.source))
    for (path, ours), (same, theirs) in zip(one, stacked, strict=True):
        assert path == same
        assert np.asarray(ours[...]).tobytes() == np.asarray(theirs[...]).tobytes(), path


def test_the_comparison_reads_them_too(cases, apart):
    """The other side of `verify --against`."""
    assert compare(cases["text_only"].converted, apart["text_only"], progress=False).agrees


def without(*names: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def one_too_many(tensors):
    return tensors | {EXPERT.format(8): tensors[EXPERT.format(7)]}


def both_ways(tensors):
    stack = torch.stack([torch.cat([tensors[EXPERT.format(e).replace("gate", p)].T for p in ("gate", "up")], -1) for e in range(8)])
    return tensors | {"language_model.model.layers.1.feed_forward.experts.gate_up_proj": stack}


DAMAGED = {
    "one is missing": (without(EXPERT.format(3)), f"source lacks {EXPERT.format(3)}: config and weights belong to different models"),
    "the first is missing": (without(EXPERT.format(0)), f"source lacks {EXPERT.format(0)}: "),
    "all of a part are missing": (
        without(*(EXPERT.format(e) for e in range(8))),
        f"source lacks {EXPERT.format(0)}, {EXPERT.format(1)}, {EXPERT.format(2)} and 5 more: ",
    ),
    "one expert too many": (one_too_many, "source has 9 routed experts, the config asks for 8: config and weights belong to different"),
    "an expert is missing everywhere": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if ".experts.5." not in name},
        "source has 7 routed experts, but no routed expert 5, the config asks for 8: ",
    ),
    "one in another dtype": (
        lambda tensors: tensors | {EXPERT.format(3): tensors[EXPERT.format(3)].float()},
        f"{EXPERT.format(3)} is float32, other parts of {STACK} are bfloat16",
    ),
    "one of another shape": (
        lambda tensors: tensors | {EXPERT.format(3): tensors[EXPERT.format(3)].T},
        f"{EXPERT.format(3)} has shape [160, 96], the model's config asks for [96, 160].",
    ),
    "one by one and stacked": (
        both_ways,
        f"source has the unexpected {EXPERT.format(0)}, ... and 13 more",
    ),
    "one has a scale": (
        lambda tensors: tensors | {f"{EXPERT.format(3)}_scale": torch.ones(96, 1)},
        f"{EXPERT.format(3)} is bfloat16 and has {EXPERT.format(3)}_scale beside it, as FP8 values have: use the bfloat16",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_experts_that_are_not_all_there_are_refused(maverick, tmp_path, damage, refused):
    change, message = DAMAGED[damage]
    source = like(maverick, tmp_path / "source", change)
    with refused(message):
        convert(source, tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))
