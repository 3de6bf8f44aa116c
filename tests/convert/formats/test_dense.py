"""Models without experts, and models whose embedding is their unembedding too: every way through the converter and the model.

`mobile` is like MobileLLM-R1 (flat, tied, RoPE on every layer), `guard` like Llama Guard 4 (pictures, full attention), and
`mixture` ties the tables of a Maverick.
"""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

from maverick_jax import Config, load, make_mesh, save
from maverick_jax.assets import mini_directory
from maverick_jax.convert import convert, export
from maverick_jax.convert.formats import tied
from maverick_jax.convert.proof.compare import compare
from maverick_jax.convert.proof.verify import verify
from maverick_jax.inference.cache import KVCache
from maverick_jax.inference.generate import engine_for
from maverick_jax.inference.request import Request
from maverick_jax.plan import make_plan
from oracle import tiny_checkpoints
from oracle.forward import TOLERANCE, cached_step, logits, text_ids
from oracle.pair import picture_prompt

DENSE = dict(num_hidden_layers=4, moe_layers=[], num_local_experts=0, num_experts_per_tok=0)
WITHOUT = 1 << 20  # transformers computes no attention without chunks: one larger than any prompt is the same


def make(variant: str) -> torch.nn.Module:
    if variant == "mobile":
        rope = {"rope_type": "default", "rope_theta": 8e6}
        values = tiny_checkpoints.text_values(
            **DENSE, tie_word_embeddings=True, use_qk_norm=True, no_rope_layers=[1] * 4, attn_temperature_tuning=False, rope_parameters=rope
        )
        config = Llama4TextConfig(**values)
    else:
        text = DENSE | {"attention_chunk_size": WITHOUT} if variant == "guard" else {"num_hidden_layers": 4, "tie_word_embeddings": True}
        config = tiny_checkpoints.make_config("maverick", text=text, vision={"num_hidden_layers": 1})
    model = tiny_checkpoints.make_model(config)
    if config.get_text_config().tie_word_embeddings:  # logits of the usual size, from a table whose rows serve twice
        model.get_input_embeddings().weight.data /= 16
    return model


class Case:
    """A model of transformers, its checkpoint as its publisher writes it, and our conversion of that."""

    def __init__(self, variant: str, folder: Path):
        self.model, self.source, self.converted = make(variant), folder / variant, folder / f"{variant}-converted"
        with warnings.catch_warnings():  # torch's, about a buffer of transformers
            warnings.simplefilter("ignore")
            tiny_checkpoints.save_checkpoint(self.model, self.source)
        self.write_config(variant)
        shutil.copyfile(mini_directory() / "tokenizer.json", self.source / "tokenizer.json")
        convert(self.source, self.converted, progress=False)

    def write_config(self, variant: str) -> None:
        values = json.loads((self.source / "config.json").read_text())
        if variant == "mobile":
            values |= {"moe_layers": [], "interleave_moe_layer_step": 0, "no_rope_layers": [1] * 4}
        if variant == "guard":
            values["text_config"] |= {"moe_layers": [], "interleave_moe_layer_step": 0, "attention_chunk_size": None}
        (self.source / "config.json").write_text(json.dumps(values))

    def expected(self, ids: np.ndarray, tiles: np.ndarray | None = None) -> np.ndarray:
        pictures = {} if tiles is None else {"pixel_values": torch.tensor(tiles)}
        with torch.no_grad():
            return self.model(input_ids=torch.tensor(ids, dtype=torch.long), use_cache=False, **pictures).logits.numpy()


@pytest.fixture(scope="module")
def dense(module_path) -> dict[str, Case]:
    return {variant: Case(variant, module_path) for variant in ("mobile", "guard", "mixture")}


@pytest.fixture(params=["mobile", "guard", "mixture"])
def one(request, dense) -> Case:
    return dense[request.param]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_logits(one):
    """As it is and converted, across several chunks, with pictures where the model sees."""
    ids, tiles = picture_prompt() if one.model.config.model_type == "llama4" else (text_ids(1, 53), None)
    expected = one.expected(ids, tiles)
    for directory in (one.source, one.converted):
        assert_allclose(logits(load(directory, dtype="float32"), ids, tiles), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", ["mobile", "guard"])
def test_prefill_and_decode(dense, variant):
    """A piece, then token by token across the border of a chunk."""
    one = dense[variant]
    model, ids = load(one.converted, dtype="float32"), text_ids(2, 40)
    cache, found = KVCache.create(model.config.text, 2, 64, dtype="float32"), []
    for piece in (ids[:, :30], *(ids[:, i : i + 1] for i in range(30, 40))):
        out, cache = cached_step(model, piece, np.full(2, piece.shape[1], np.int32), cache)
        found.append(np.asarray(out))
    assert_allclose(np.concatenate(found, axis=1), one.expected(ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("variant", "layout"), [("mobile", "throughput"), ("mobile", "latency"), ("guard", "latency"), ("mixture", "throughput")]
)
def test_on_eight_devices(dense, variant, layout):
    """A table that is both ends of the model is divided like either."""
    one, ids = dense[variant], text_ids(8, 20)
    model = load(one.converted, mesh=make_mesh(data=2, expert=2, tensor=2), layout=layout, dtype="float32")
    assert_allclose(logits(model, ids), one.expected(ids), atol=TOLERANCE, rtol=0)
    assert len(model.text.embedding[...].sharding.device_set) == 8
    assert not model.text.embedding[...].sharding.is_fully_replicated


def test_every_way_through_the_converter(one, tmp_path):
    """Digests, each tensor made again, layer by layer beside transformers, and back to the bytes that it came from."""
    assert verify(one.converted, one.source, progress=False).problems == []
    found = compare(one.converted, one.source, progress=False)
    assert found.agrees, found.as_table()
    assert [row.routing is None for row in found.rows].count(False) == len(Config.from_directory(one.source).text.moe_layers)
    out = export(one.converted, tmp_path / "exported", progress=False)
    assert (out / "config.json").read_bytes() == (one.source / "config.json").read_bytes()
    ours, theirs = stored(out), stored(one.source)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any("lm_head" in name for name in ours) is not one.model.config.get_text_config().tie_word_embeddings


def test_transformers_reads_what_we_write(one, tmp_path):
    """From a model in memory, whose config.json is ours: no tensor too many, none missing, and it computes the same."""
    save(load(one.converted, dtype="float32"), tmp_path / "saved")
    out = export(tmp_path / "saved", tmp_path / "exported", progress=False)
    assert Config.from_directory(out).text == Config.from_directory(one.source).text
    family = Llama4ForConditionalGeneration if Config.from_directory(out).vision else AutoModelForCausalLM
    model, report = family.from_pretrained(out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = text_ids(1, 30)
    with torch.no_grad():
        again = model(input_ids=torch.tensor(ids, dtype=torch.long), use_cache=False).logits.numpy()
    assert_allclose(again, one.expected(ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("target", ["int8", "fp8", "int4"])
def test_quantized(dense, target, tmp_path):
    """Of a dense model the dense layers and attention; its tables stay as they are, and one of them serves twice."""
    convert(dense["mobile"].source, tmp_path / "out", target=target, quantize=("dense", "attention"), progress=False)
    model, ids = load(tmp_path / "out", dtype="float32"), text_ids(1, 20)
    assert hasattr(model.text.layers[0].feed_forward.gate, "scales")
    assert not hasattr(model.text.embedding, "scales")
    ours, expected = logits(model, ids), dense["mobile"].expected(ids)
    assert np.corrcoef(ours.ravel(), expected.ravel())[0, 1] > (0.9 if target == "int4" else 0.99)


def test_generation_of_a_model_without_mixtures(dense):
    """Its tokens are transformers' greedy ones, and the load of no experts in no layers is an empty table."""
    model, ids = load(dense["mobile"].converted, dtype="float32"), text_ids(1, 20)
    with torch.no_grad():
        expected = dense["mobile"].model.generate(torch.tensor(ids, dtype=torch.long), max_new_tokens=12, do_sample=False, eos_token_id=[])
    engine = engine_for(model, [32])
    assert engine.run([Request(ids=ids[0], max_new_tokens=12, stop_ids=())])[0].tokens == expected[0, 20:].tolist()
    assert engine.load_ME.shape == (0, 0)
    assert engine.dropped == 0


def test_described_and_planned(one):
    """The parameters are those that transformers counts, once each; a plan reads the shared table as both."""
    config = Config.from_directory(one.source)
    plan = make_plan(config, topology="v6e:1x1", batch=2, context=64)
    assert plan.case.parameter_count == sum(parameter.numel() for parameter in one.model.parameters())
    apart = dataclasses.replace(config, text=dataclasses.replace(config.text, tie_word_embeddings=False))
    untied = make_plan(apart, topology="v6e:1x1", batch=2, context=64)
    for shared, own in ((plan.decode.read, untied.decode.read), (plan.decode.products, untied.decode.products)):
        assert sum(shared.values()) == sum(own.values())
    assert "embedding" in str(plan)


UNEMBEDDING, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def with_tables(dense: dict[str, Case], folder: Path, change) -> Path:
    """The tied checkpoint in one file, its tensors changed."""
    shutil.copytree(dense["mobile"].source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(change(stored(dense["mobile"].source)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {UNEMBEDDING: tensors[EMBEDDING].clone()},
        lambda tensors: {UNEMBEDDING if name == EMBEDDING else name: tensor for name, tensor in tensors.items()},
    ],
    ids=["both", "the other alone"],
)
def test_one_table_under_either_name(dense, tmp_path, change):
    """As transformers reads them; older tools store both, and FSDP the one that it met last."""
    source = with_tables(dense, tmp_path / "source", change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    ids = text_ids(1, 20)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids, dtype=torch.long), use_cache=False).logits.numpy()
    assert_allclose(logits(load(source, dtype="float32"), ids), expected, atol=TOLERANCE, rtol=0)
    assert_allclose(expected, dense["mobile"].expected(ids), atol=TOLERANCE, rtol=0)
    convert(source, tmp_path / "out", progress=False)
    assert verify(tmp_path / "out", source, progress=False).problems == []
    assert compare(tmp_path / "out", source, progress=False).agrees


def test_two_tables_that_differ_are_not_tied(dense, tmp_path, refused, monkeypatch):
    """In the last of their bytes even; the config is wrong, and only its owner knows it."""
    monkeypatch.setattr(tied, "BLOCK", 1000)

    def change(tensors):
        other = tensors[EMBEDDING].clone()
        other[-1, -1] += 1
        return tensors | {UNEMBEDDING: other}

    source = with_tables(dense, tmp_path / "source", change)
    with refused(f"says tie_word_embeddings, but {UNEMBEDDING} is not {EMBEDDING}: set it to false"):
        load(source)
    values = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(values))
    assert load(source).text.unembedding.shape == (160, 1024)
