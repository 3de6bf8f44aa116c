"""`compare` finds transformers and us in agreement, and every way in which we might not be, at the stage where it begins."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
from safetensors.torch import load_file, save_file

from maverick_jax.config import Config
from maverick_jax.convert import ModelDirectory, convert
from maverick_jax.convert.build.writer import array_spec
from maverick_jax.convert.proof.compare import TOLERANCE, Comparison, Row, compare, reference
from maverick_jax.convert.proof.compare.reference import Reference, read_config
from maverick_jax.convert.proof.compare.stages import TILES, Prompt, State, make_prompt
from oracle import tiny_checkpoints

ROUNDING = 1e-5  # relative; measured: up to 4e-6 after eight layers. A fault is 1e-3 and more.


@pytest.fixture(scope="module")
def comparisons(cases) -> dict[str, Comparison]:
    return {variant: compare(case.converted, case.source, progress=False) for variant, case in cases.items()}


@pytest.fixture
def converted(maverick, tmp_path) -> Path:
    """A model directory to damage."""
    return shutil.copytree(maverick.converted, tmp_path / "converted")


def change(directory: Path, name: str, index: tuple = (), by: float = -1.0) -> None:
    """Multiply a part of a parameter."""
    array = tensorstore.open(array_spec(directory / "params", name), open=True).result()
    values = array.read().result()
    values[index] = (values[index].astype(np.float32) * by).astype(values.dtype)
    array.write(values).result()


def change_stored(directory: Path, name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change a tensor of a checkpoint."""
    file = directory / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    save_file(tensors | {name: to(tensors[name])}, file, metadata={"format": "pt"})


def find(comparison: Comparison, stage: str) -> Row:
    return next(row for row in comparison.rows if row.stage == stage)


def first_fault(comparison: Comparison) -> str:
    """The first stage that does not agree; those before it must do so as well as ever."""
    stages = [row.stage for row in comparison.rows if row.relative > TOLERANCE]
    before = comparison.rows[: next(i for i, row in enumerate(comparison.rows) if row.stage == stages[0])]
    assert all(row.relative < ROUNDING for row in before)
    return stages[0]


@pytest.mark.parametrize("variant", ["maverick", "scout", "text_only"])
def test_every_stage_agrees(comparisons, variant):
    rows = comparisons[variant].rows
    layers = [f"layer {i}" for i in range(4)]
    assert [row.stage for row in rows] == [*(["vision"] if variant != "text_only" else []), "embedding", *layers, "logits"]
    assert all(row.relative < ROUNDING for row in rows)
    assert all(1 < row.largest < 100 for row in rows)
    assert comparisons[variant].agrees


@pytest.mark.parametrize("variant", ["maverick", "scout"])
def test_routing_is_told_of_mixtures_only(comparisons, variant):
    dense = {"layer 0", "layer 2"} if variant == "maverick" else set()
    for row in comparisons[variant].rows:
        assert row.routing == (1.0 if row.stage.startswith("layer") and row.stage not in dense else None)


@pytest.mark.parametrize("variant", ["maverick", "scout", "text_only"])
def test_the_reference_is_what_transformers_computes_in_one_piece(cases, variant):
    """Were our way through its modules not its own, both sides might share a mistake."""
    case, prompt = cases[variant], make_prompt(Config.from_directory(cases[variant].source))
    tiles = {} if prompt.tiles is None else {"pixel_values": torch.tensor(prompt.tiles)}
    with torch.no_grad():
        whole = case.model(input_ids=torch.tensor(prompt.ids, dtype=torch.long), use_cache=False, output_hidden_states=True, **tiles)
    found = {state.stage: state.values for state in Reference(case.source).run(prompt)}
    expected = dict(zip(["embedding", "layer 0", "layer 1", "layer 2"], whole.hidden_states, strict=False)) | {"logits": whole.logits}
    for stage, values in expected.items():
        np.testing.assert_allclose(found[stage], values[0].numpy(), atol=1e-4, err_msg=stage)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("vision.layers.0.attention.output", "vision"),
        ("projector", "vision"),
        ("text.embedding", "embedding"),
        ("text.layers.2.attention.key", "layer 2"),
        ("text.layers.0.feed_forward.up", "layer 0"),
        ("text.layers.1.feed_forward.shared.down", "layer 1"),
        ("text.norm", "logits"),
        ("text.unembedding", "logits"),
    ],
)
def test_a_wrong_weight_shows_where_it_is_used(maverick, converted, name, stage):
    change(converted, name)
    comparison = compare(converted, maverick.source, progress=False)
    assert first_fault(comparison) == stage
    assert not comparison.agrees


def test_one_wrong_row_of_one_expert_shows(maverick, converted):
    """The least fault: one of 96 inputs of one of eight experts."""
    change(converted, "text.layers.3.feed_forward.experts.down", (5, 7))
    comparison = compare(converted, maverick.source, progress=False)
    assert first_fault(comparison) == "layer 3"
    assert find(comparison, "layer 3").relative > 100 * TOLERANCE


def test_a_wrong_tensor_of_the_checkpoint_shows(maverick, tmp_path):
    """The reference reads the checkpoint and not what we made of it."""
    source = shutil.copytree(maverick.source, tmp_path / "source")
    change_stored(source, "language_model.model.layers.1.self_attn.v_proj.weight", lambda weight: weight.roll(1, dims=0))
    assert first_fault(compare(maverick.converted, source, progress=False)) == "layer 1"


def test_other_routes_show(maverick, converted):
    change(converted, "text.layers.1.feed_forward.router")
    comparison = compare(converted, maverick.source, progress=False)
    assert first_fault(comparison) == "layer 1"
    assert find(comparison, "layer 1").routing < 0.5


def test_the_reference_settles_ties_as_we_do_and_nothing_else(maverick, tmp_path):
    """Of two experts with one score it takes the preferred; where the router knows better, it does not."""
    source, name = shutil.copytree(maverick.source, tmp_path / "source"), "language_model.model.layers.1.feed_forward.router.weight"
    change_stored(source, name, lambda router: router.index_copy(0, torch.tensor([2]), router[5:6]))
    prompt = make_prompt(Config.from_directory(source))

    def layer_1(prefer):
        return next(state for state in Reference(source, prefer).run(prompt) if state.stage == "layer 1")

    own = layer_1(None)
    two, five = (layer_1(lambda expert=expert: np.full(prompt.ids.shape[1], expert)) for expert in (2, 5))
    tied = np.isin(own.expert_T, [2, 5])
    assert 0 < tied.sum() < tied.size
    assert np.array_equal(np.abs(two.values - five.values).max(axis=1) > 0.1, tied)
    np.testing.assert_allclose(two.values[~tied], own.values[~tied], atol=1e-5)
    for state in (two, five):
        np.testing.assert_array_equal(state.expert_T, own.expert_T)


@pytest.mark.parametrize("variant", ["maverick", "text_only"])
def test_fp8_is_no_approximation_of_itself(cases, tmp_path, variant):
    """Values and scales as the official checkpoint has them stand for the same weights on both sides."""
    source = tiny_checkpoints.save_fp8_checkpoint(cases[variant].model, tmp_path / "source") or tmp_path / "source"
    convert(source, tmp_path / "converted", progress=False)
    comparison = compare(tmp_path / "converted", source, progress=False)
    assert comparison.worst.relative < ROUNDING
    change(tmp_path / "converted", "text.layers.1.feed_forward.experts.gate.scales", by=1.01)
    assert first_fault(compare(tmp_path / "converted", source, progress=False)) == "layer 1"


@pytest.mark.parametrize(("target", "cost"), [("int8", 0.02), ("int4", 0.3)])
def test_quantized_experts_tell_what_they_cost(maverick, tmp_path, target, cost):
    """The dense layer before the first mixture is as it was; the mixture is not, and yet it is the same model."""
    convert(maverick.source, tmp_path / "converted", target=target, progress=False)
    comparison = compare(tmp_path / "converted", maverick.source, progress=False)
    assert first_fault(comparison) == "layer 1"
    assert find(comparison, "layer 1").relative < cost
    assert find(comparison, "layer 1").routing == 1


def test_no_more_than_one_matrix_of_one_expert_is_read_at_once(maverick, monkeypatch):
    """Of an expert stack of Maverick's, 32 GB, and only for the experts that a token is sent to."""
    ours, theirs, states = [], [], []
    read, read_reference, make = ModelDirectory.read, reference.read, Row.of

    def read_ours(self, name, index):
        ours.append((name, values := read(self, name, index), index[0].start))
        return values

    def read_theirs(tensor, at=()):
        theirs.append((tensor, values := read_reference(tensor, at), at[0].start if at else 0))
        return values

    monkeypatch.setattr(ModelDirectory, "read", read_ours)
    monkeypatch.setattr(reference, "read", read_theirs)
    monkeypatch.setattr(Row, "of", lambda a, b: (states.append(a), make(a, b))[1])
    ids = np.full_like(make_prompt(Config.from_directory(maverick.source)).ids, 7)  # equal tokens go one way, wherever they are
    monkeypatch.setitem(compare.__globals__, "make_prompt", lambda _: Prompt(ids, None))
    assert compare(maverick.converted, maverick.source, progress=False).agrees
    table = maverick.tensors["language_model.model.embed_tokens.weight"].shape
    used = {f"text.layers.{state.stage.split()[1]}": set(state.expert_T.tolist()) for state in states if state.expert_T is not None}
    assert [len(experts) for experts in used.values()] == [1, 1]
    for layer, experts in used.items():
        for part in ("gate", "up", "down"):
            reads = [(values.shape[0], e) for name, values, e in ours if name == f"{layer}.feed_forward.experts.{part}"]
            assert sorted(reads) == [(1, e) for e in sorted(experts)]
    stacks = [(values.shape[0], e) for tensor, values, e in theirs if len(tensor.shape) == 3]
    assert sorted(stacks) == sorted((1, e) for experts in used.values() for e in experts for _ in ("gate and up", "down"))
    rows = [values.shape[0] for name, values, _ in ours if name == "text.embedding"]
    rows += [values.shape[0] for tensor, values, _ in theirs if tensor.shape == table and values.shape[0] < table[0]]
    assert set(rows) == {1}


def test_the_reference_lets_go_of_its_weights(maverick):
    reference = Reference(maverick.source)
    expert = reference._make_expert("language_model.model.layers.1.feed_forward.experts.", 3)
    assert expert(torch.ones(2, 160)).abs().max() > 0
    assert all(parameter.is_meta for parameter in expert.parameters())


def test_full_attention_and_an_integer_switch_as_some_mirrors_write_them(cases, tmp_path):
    """transformers refuses both spellings; we read them, so they can be compared."""
    source = shutil.copytree(cases["text_only"].source, tmp_path / "source")
    values = json.loads((source / "config.json").read_text())
    values |= {"attention_chunk_size": None, "attn_temperature_tuning": 4, "layer_types": None}
    (source / "config.json").write_text(json.dumps(values))
    convert(source, tmp_path / "converted", progress=False)
    comparison = compare(tmp_path / "converted", source, progress=False)
    assert comparison.agrees
    prompt = make_prompt(Config.from_directory(cases["text_only"].source))
    chunked = {state.stage: state.values for state in Reference(cases["text_only"].source).run(prompt)}
    full = {state.stage: state.values for state in Reference(source).run(prompt)}
    assert np.abs(chunked["layer 0"] - full["layer 0"]).max() > 0.1


def test_the_prompt_goes_beyond_a_short_chunk(maverick):
    config = Config.from_directory(maverick.source)
    ids, tiles = make_prompt(config)
    assert ids.shape[1] > 3 * config.text.attention_chunk_size
    assert tiles.shape == (TILES, 3, 56, 56)


def test_the_prompt_of_a_release_is_short(maverick):
    """Ordinary tokens around the picture: none above the vocabulary's text, a whole number of tiles."""
    config = Config.maverick()
    ids, tiles = make_prompt(config)
    is_patch = ids == config.image_token_index
    assert ids.shape[1] < 400
    assert is_patch.sum() == len(tiles) * config.vision.tokens_per_tile
    assert ids[~is_patch].max() < 200_000
    np.testing.assert_array_equal(ids, make_prompt(config).ids)


def test_transformers_missing(maverick, monkeypatch, refused):
    monkeypatch.delitem(sys.modules, "maverick_jax.convert.proof.compare.reference")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused("comparing with transformers takes PyTorch: pip install 'maverick-jax[torch]' transformers"):
        compare(maverick.converted, maverick.source, progress=False)


def test_metas_files_are_no_hugging_face_directory(maverick, tmp_path, refused):
    (tmp_path / "consolidated.00.pth").touch()
    with refused("holds Meta's .pth files...takes a Hugging Face directory"):
        compare(maverick.converted, tmp_path, progress=False)


def test_another_model(cases, refused):
    with refused("are different models: text.layers.0.feed_forward.down is (192, 160) in the one and missing in the other"):
        compare(cases["maverick"].converted, cases["scout"].source, progress=False)


def test_what_is_no_number_is_worst():
    ours, reference = np.ones((3, 4), np.float32), np.ones((3, 4), np.float32)
    fine = Row.of(State("layer 0", ours), State("layer 0", reference))
    broken = Row.of(State("layer 1", ours * np.inf), State("layer 1", reference * np.inf))
    comparison = Comparison((fine, broken, fine))
    assert math.isnan(broken.relative)
    assert comparison.worst is broken
    assert not comparison.agrees
    assert Comparison((fine,)).agrees


def test_errors_are_relative_to_their_token():
    """One token a thousand times as large as the others does not hide what is wrong with these."""
    reference = np.ones((3, 4), np.float32)
    reference[0] = 1e4
    ours = reference.copy()
    ours[2, 1] += 0.25
    expert_T = np.array([0, 1, 1])
    row = Row.of(State("layer 1", ours, expert_T), State("layer 1", reference, np.array([0, 1, 2])))
    assert row == Row("layer 1", error=0.25, largest=1e4, relative=0.25, routing=2 / 3)


def test_for_people_and_for_json(comparisons):
    comparison = comparisons["maverick"]
    head, rule, *lines = comparison.as_table().splitlines()
    assert len({len(line) for line in (head, rule, *lines)}) == 1
    assert re.fullmatch(r"layer 1 +\d\.\de-\d\d +[\d.]+ +\d\.\de-\d\d +100\.0%", lines[3])
    values = json.loads(json.dumps(comparison.as_dict()))
    assert values["agrees"] is True
    assert values["stages"][3] == find(comparison, "layer 1")._asdict()


def test_the_config_in_both_spellings(maverick, tmp_path):
    """That of the releases, and that of transformers 5."""
    release = read_config(maverick.source)
    (tmp_path / "config.json").write_text(json.dumps(maverick.model.config.to_dict()))
    ours = read_config(tmp_path)
    for field in ("rope_parameters", "layer_types", "no_rope_layers", "moe_layers"):
        assert getattr(release.text_config, field) == getattr(ours.text_config, field), field
