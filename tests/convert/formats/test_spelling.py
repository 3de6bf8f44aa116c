"""Names as other tools write them: what stands before all of them is left out and named once, and so is what changes nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from maverick_jax.convert import convert, inspect, open_source
from maverick_jax.convert.build.estimate import estimate
from maverick_jax.convert.proof.compare.reference import Reference
from maverick_jax.convert.proof.verify import verify
from oracle.other_tools import load_tensors, rename_tensors, replace_tensors

LAYER = "language_model.model.layers.{}."
QUERY = LAYER.format(1) + "self_attn.q_proj.weight"


def copy(case, directory: Path) -> Path:
    return shutil.copytree(case.source, directory)


def everything(source) -> dict[str, bytes]:
    return {name: source.read(name, (slice(None),) * len(shape)).tobytes() for name, (shape, _) in source.parameters.items()}


BEFORE = (
    "model.",  # a trainer's attribute, Lightning's among them
    "module.",  # DistributedDataParallel
    "_orig_mod.",  # torch.compile
    "base_model.model.",  # peft
    "module._orig_mod.",
    "base_model.model.model.",
    "_fsdp_wrapped_module._orig_mod.",
    "policy.llm.",  # whatever it is: the embedding's name tells
)


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("variant", ["maverick", "text_only"])
def test_what_stands_before_all_names_is_left_out_and_named_once(cases, tmp_path, variant, before):
    source = open_source(rename_tensors(copy(cases[variant], tmp_path / "source"), lambda name: before + name))
    assert source.notes == (f"names are read without {before}, which other tools put into them.",)
    assert everything(source) == everything(open_source(cases[variant].source))


def test_the_releases_names_are_no_news(cases):
    for case in cases.values():
        assert open_source(case.source).notes == ()


@pytest.mark.parametrize("text_only_names", [True, False])
def test_a_text_model_may_have_the_names_of_either_class(cases, tmp_path, text_only_names):
    """`Llama4ForCausalLM`, or the same taken out of the whole model."""
    case = cases["text_only"]
    before = "" if text_only_names else "language_model."
    source = open_source(rename_tensors(copy(case, tmp_path / "source"), lambda name: before + name))
    assert source.notes == ()
    assert everything(source) == everything(open_source(case.source))


@pytest.mark.parametrize("before", ["", "module."])
def test_the_language_model_may_be_inside_the_model(maverick, tmp_path, before, refused):
    """As transformers names the parts in other families with pictures, the unembedding outside."""

    def rename(name):
        inside = name.replace("language_model.model.", "language_model.")
        return before + (inside.removeprefix("language_model.") if "lm_head" in name else f"model.{inside}")

    source = rename_tensors(copy(maverick, tmp_path / "source"), rename)
    assert everything(open_source(source)) == everything(open_source(maverick.source))
    lost = [rename(name) for name in (QUERY, "vision_model.class_embedding")]
    rename_tensors(source, lambda name: f"spare{lost.index(name)}" if name in lost else name)
    with refused(f"source lacks {lost[0]}, {lost[1]}, and has the unexpected ...spare0, ...spare1: config"):
        open_source(source)


def test_words_of_wrapped_layers_are_left_out(maverick, tmp_path):
    """torch wraps layers one by one, too: compiled, sharded, or computed again in the backward pass."""

    def wrap(name):
        return name.replace(".layers.1.", ".layers.1._orig_mod.").replace(".layers.3.", ".layers.3._checkpoint_wrapped_module.")

    source = open_source(rename_tensors(copy(maverick, tmp_path / "source"), lambda name: f"module.{wrap(name)}"))
    words = "module. and _checkpoint_wrapped_module. and _orig_mod."
    assert source.notes == (f"names are read without {words}, which other tools put into them.",)
    assert everything(source) == everything(open_source(maverick.source))


def test_the_prefix_is_found_in_pth_files(two_ranks, tmp_path):
    source = shutil.copytree(two_ranks, tmp_path / "source")
    for file in source.glob("*.pth"):
        entries = {f"module.{name}": value for name, value in torch.load(file, weights_only=False).items()}
        torch.save(entries, file)
    found = open_source(source)
    assert found.notes == ("names are read without module., which other tools put into them.",)
    assert everything(found) == everything(open_source(two_ranks))
    assert all(name.startswith("module.") for _, name in found.tensors)


def test_the_files_own_names_are_told(maverick, tmp_path, refused):
    """Messages and manifest must name what is in the file."""
    source = rename_tensors(copy(maverick, tmp_path / "source"), lambda name: f"module.{name}")
    convert(source, tmp_path / "out", progress=False)
    made_from = json.loads((tmp_path / "out/manifest.json").read_text())["tensors"]["text.layers.1.attention.query"]["from"]
    assert [key.partition(":")[2] for key in made_from] == [f"module.{QUERY}"]
    assert verify(tmp_path / "out", source, progress=False).problems == []
    rename_tensors(source, lambda name: "module.spare" if name == f"module.{QUERY}" else name)
    with refused(f"source lacks module.{QUERY}, and has the unexpected module.spare: config and weights"):
        open_source(source)


def test_transformers_side_of_the_comparison_reads_them(maverick, tmp_path):
    source = rename_tensors(copy(maverick, tmp_path / "source"), lambda name: f"base_model.model.{name}")
    assert Reference(source).tensors.keys() == maverick.tensors.keys()


def test_several_models_in_one_directory_are_refused(maverick, tmp_path, refused):
    """Of a policy and its reference nobody can say which is meant."""
    tensors = load_tensors(maverick.source)
    both = {f"{before}{name}": tensor for before in ("policy.", "reference.") for name, tensor in tensors.items()}
    source = replace_tensors(copy(maverick, tmp_path / "source"), both)
    with refused("source holds several models, with names behind policy., reference.: save one of them alone."):
        open_source(source)


def test_two_names_of_one_tensor_are_refused(maverick, tmp_path, refused):
    """Taken for one, the second would be read in silence."""
    tensors = load_tensors(maverick.source)
    source = replace_tensors(copy(maverick, tmp_path / "source"), tensors | {f"_orig_mod.{QUERY}": tensors[QUERY] + 1})
    with refused(f"source has _orig_mod.{QUERY} and {QUERY}, which name one tensor: save the model once."):
        open_source(source)


def test_a_prefix_of_some_names_is_no_prefix(maverick, tmp_path, refused):
    source = rename_tensors(copy(maverick, tmp_path / "source"), lambda name: f"module.{name}" if "q_proj" in name else name)
    with refused(
        f"source lacks {LAYER.format(0)}self_attn.q_proj.weight, ... and has the unexpected module.{LAYER.format(0)}self_attn.q_proj"
    ):
        open_source(source)


def test_a_name_without_what_stands_before_the_others_is_another_name(cases, tmp_path, refused):
    """Of two models in one file, the second would fill what the first lacks."""
    source = rename_tensors(copy(cases["text_only"], tmp_path / "source"), lambda name: name if "q_proj" in name else f"module.{name}")
    query = "model.layers.0.self_attn.q_proj.weight"
    with refused(f"source lacks module.{query}, ... and 1 more, and has the unexpected {query}, "):
        open_source(source)


LEFTOVERS = {
    LAYER.format(0) + "self_attn.k_scale": torch.ones(()),
    LAYER.format(1) + "self_attn.k_scale": torch.ones(()),
    LAYER.format(0) + "self_attn.v_scale": torch.ones(1),
    LAYER.format(0) + "self_attn.attn.kv_scale": torch.ones(1),
    LAYER.format(0) + "self_attn.q_proj.input_scale": torch.ones(1),
    LAYER.format(1) + "feed_forward.experts.down_proj_input_scale": torch.ones(1),
    LAYER.format(0) + "self_attn.k_proj.output_scale": torch.ones(1),
    LAYER.format(0) + "self_attn.rotary_emb.inv_freq": torch.ones(8),
    LAYER.format(0) + "self_attn.masked_bias": torch.ones(1, dtype=torch.bool),
    "vision_model.embeddings.position_ids": torch.arange(17),
    "vision_model.rotary_embedding.freqs_ci": torch.ones(17, 8),
}
NOTE = (
    "passed over, for they change nothing: input_scale (2), k_proj.output_scale (1), k_scale (2), kv_scale (1), "
    "position_ids (1), rotary_emb.inv_freq (1), rotary_embedding.freqs_ci (1), self_attn.masked_bias (1), v_scale (1)."
)


@pytest.fixture(scope="module")
def littered(cases, module_path) -> Path:
    """The checkpoint with what is left of caches, calibrations and older versions."""
    source = copy(cases["maverick"], module_path / "littered")
    return replace_tensors(source, load_tensors(source) | LEFTOVERS, shards=1)


def test_what_changes_nothing_is_passed_over_and_listed_once(maverick, littered):
    source = open_source(littered)
    assert source.notes == (NOTE,)
    assert everything(source) == everything(open_source(maverick.source))


def test_every_way_in_tells(maverick, littered, tmp_path):
    """`convert`, its dry run, `verify` and `inspect`; the inventory is that of the weights."""
    assert estimate(littered, tmp_path / "out").notes == (NOTE,)
    assert convert(littered, tmp_path / "out", progress=False).notes == (NOTE,)
    assert verify(tmp_path / "out", littered, progress=False).notes == (NOTE,)
    assert inspect(littered).notes == (NOTE,)
    assert inspect(littered).entries == inspect(maverick.source).entries


NO_LEFTOVERS = {
    "a bias": LAYER.format(0) + "self_attn.q_proj.bias",
    "a scale of a weight": LAYER.format(0) + "self_attn.q_proj.scale",
    "a correction of the router": LAYER.format(1) + "feed_forward.router.e_score_correction_bias",
    "a scale of the inputs of nothing": LAYER.format(0) + "self_attn.qkv_proj.input_scale",
    "a norm of the keys": LAYER.format(0) + "self_attn.k_norm.weight",
}


@pytest.mark.parametrize("kind", NO_LEFTOVERS)
def test_what_may_change_something_is_no_leftover(maverick, tmp_path, kind, refused):
    """Passed over, the model would answer as if it were another one."""
    name = NO_LEFTOVERS[kind]
    source = replace_tensors(copy(maverick, tmp_path / "source"), load_tensors(maverick.source) | {name: torch.ones(4)})
    with refused(f"source has the unexpected {name}: config and weights belong to different models"):
        open_source(source)


def test_llama4_text_model_alone_has_no_unembedding(cases, tmp_path, refused):
    """The base class, as `AutoModel` saves it: no logits come of it."""
    case = cases["text_only"]
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_tensors(case.source).items() if name != "lm_head.weight"}
    source = replace_tensors(copy(case, tmp_path / "source"), tensors)
    with refused("source has no unembedding (lm_head.weight): Llama4TextModel alone has none; save the model around it."):
        open_source(source)


def test_an_adapter_that_is_not_merged_is_named(maverick, tmp_path, refused):
    """The whole state of a model of peft: its base weights alone would be the model before the training."""

    def wrap(name):
        return "base_model.model." + name.replace("q_proj.weight", "q_proj.base_layer.weight")

    tensors = {wrap(name): tensor for name, tensor in load_tensors(maverick.source).items()}
    lora = f"base_model.model.{QUERY}".replace(".weight", ".lora_A.default.weight")
    source = replace_tensors(copy(maverick, tmp_path / "source"), tensors | {lora: torch.ones(8, 160)})
    for use in (open_source, inspect):
        with refused(f"source holds an adapter beside the weights that it changes ({lora}): merge it into them first."):
            use(source)


def test_without_an_embedding_the_last_norm_tells(cases, tmp_path, refused):
    """Else every name of the model would be one too many."""
    case = cases["text_only"]
    tensors = {f"module.{name}": tensor for name, tensor in load_tensors(case.source).items() if "embed" not in name}
    source = replace_tensors(copy(case, tmp_path / "source"), tensors)
    with refused("source lacks module.model.embed_tokens.weight: config and weights belong to different models"):
        open_source(source)


def test_up_to_three_names_of_either_side_are_shown(maverick, tmp_path, refused):
    rename = {".q_proj.": ".query.", ".k_proj.": ".key."}

    def other(name):
        return next((name.replace(old, new) for old, new in rename.items() if old in name and "language" in name), name)

    source = rename_tensors(copy(maverick, tmp_path / "source"), other)
    lacks = [LAYER.format(i) + f"self_attn.{part}.weight" for i, part in ((0, "k_proj"), (0, "q_proj"), (1, "k_proj"))]
    has = [LAYER.format(i) + f"self_attn.{part}.weight" for i, part in ((0, "key"), (0, "query"), (1, "key"))]
    with refused(f"source lacks {', '.join(lacks)} and 5 more, and has the unexpected {', '.join(has)} and 5 more: config and weights"):
        open_source(source)


STRANGE = {
    "a line": "a\nb",
    "an escape sequence": "\x1b[2Jgone",
    "half a letter": "\ud800",
    "no letter": "",
    "a direction": "weight\u202eexe",
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_name_that_is_no_name_is_refused(maverick, tmp_path, kind, refused):
    """Printed, it would break the table of `inspect`, or the terminal."""
    source = rename_tensors(copy(maverick, tmp_path / "source"), lambda name: STRANGE[kind] if name == QUERY else name)
    for use in (open_source, inspect):
        with refused(f".safetensors ...{STRANGE[kind]!a}...: fetch "):
            use(source)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../weights", "слой.0", "layers.²", "layers." + "9" * 5000, "x" * 5000])
def test_another_name_is_one_too_many(maverick, tmp_path, name, refused):
    source = replace_tensors(copy(maverick, tmp_path / "source"), load_tensors(maverick.source) | {name: torch.ones(1)})
    with refused(f"source has the unexpected {name[:120]}") as error:
        open_source(source)
    assert len(str(error.value)) < 1000
    assert inspect(source).entries
