"""A table of ways to write `config.json`: each means what transformers reads in it, by the logits.

Where transformers refuses what the releases' mirrors write, or what can mean only one thing, `meant` is the same in its own words.
"""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig

from maverick_jax.config import Config
from oracle.config_spellings import ABSENT, FLAT, LLAMA3, NESTED, write
from oracle.forward import TOLERANCE
from oracle.port import port
from oracle.tiny_checkpoints import make_model

ANOTHER_BASE = {"rope_type": "default", "rope_theta": 30.0}
PATCH = NESTED["image_token_index"]


class Case(NamedTuple):
    """`meant` is what transformers is given where it does not read the file itself."""

    changes: dict[str, Any]
    meant: dict[str, Any] | None = None
    base: dict[str, Any] = FLAT


def nested(changes: dict[str, Any], meant: dict[str, Any] | None = None) -> Case:
    return Case(changes, meant, NESTED)


LOADS = {
    "as it is": Case({}),
    "dtype for torch_dtype": Case({"torch_dtype": ABSENT, "dtype": "float32"}),
    "both dtypes": Case({"dtype": "float16"}),
    "torch.bfloat16": Case({"torch_dtype": "torch.bfloat16"}, meant={}),
    "no dtype": Case({"torch_dtype": ABSENT}),
    "rope_parameters": Case({"rope_theta": ABSENT, "rope_scaling": ABSENT, "rope_parameters": ANOTHER_BASE}),
    "rope_parameters beside rope_theta": Case({"rope_parameters": ANOTHER_BASE}),
    "rope_parameters without a base": Case({"rope_parameters": {"rope_type": "default"}}),
    "rope_scaling beside rope_parameters": Case({"rope_scaling": LLAMA3, "rope_parameters": ANOTHER_BASE}),
    "rope_scaling with a base inside": Case({"rope_scaling": LLAMA3 | {"rope_theta": 30.0}}),
    "rope_scaling by its old name of type": Case({"rope_scaling": {("type" if k == "rope_type" else k): v for k, v in LLAMA3.items()}}),
    "rope_scaling without its original length": Case({"rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("orig")}}),
    "rope_scaling {}": Case({"rope_scaling": {}}),
    "rope_scaling of type default": Case({"rope_scaling": {"rope_type": "default", "factor": 8.0}}),
    "rope_theta a whole number": Case({"rope_theta": 100}),
    "rope_theta null": Case({"rope_theta": None}, meant={"rope_theta": ABSENT}),
    "no rope at all": Case({"rope_theta": ABSENT, "rope_scaling": ABSENT}),
    "no_rope_layers null": Case({"no_rope_layers": None}),
    "no_rope_layers absent": Case({"no_rope_layers": ABSENT}),
    "no_rope_layers explicit": Case({"no_rope_layers": [0, 1, 1, 0]}),
    "no_rope_layers too long": Case({"no_rope_layers": [0, 1, 1, 0, 0, 1]}, meant={"no_rope_layers": [0, 1, 1, 0]}),
    "no_rope_layers all with RoPE": Case({"no_rope_layers": [1, 1, 1, 1]}),
    "no_rope_layer_interval": Case({"no_rope_layer_interval": 2}),
    "no_rope_layer_interval beyond the layers": Case({"no_rope_layer_interval": 9}),
    "layer_types as they follow": Case({"layer_types": ["chunked_attention"] * 3 + ["full_attention"]}),
    "layer_types all full": Case({"layer_types": ["full_attention"] * 4}),
    "attention_chunk_size null": Case({"attention_chunk_size": None}, meant={"attention_chunk_size": 1000}),
    "attention_chunk_size absent": Case({"attention_chunk_size": ABSENT}),
    "moe_layers": Case({"moe_layers": [0, 3]}),
    "moe_layers twice and in any order": Case({"moe_layers": [3, 0, 3]}),
    "moe_layers null": Case({"moe_layers": None}),
    "moe_layers []": Case({"moe_layers": []}),
    "moe_layers over a step of 0": Case({"moe_layers": [], "interleave_moe_layer_step": 0}),
    "a step of 0": Case({"interleave_moe_layer_step": 0}, meant={"moe_layers": []}),
    "a step beyond the layers": Case({"interleave_moe_layer_step": 7}),
    "step absent": Case({"interleave_moe_layer_step": ABSENT}),
    "no experts": Case({"moe_layers": [], "num_local_experts": 0, "num_experts_per_tok": 0, "interleave_moe_layer_step": 0}),
    "tied": Case({"tie_word_embeddings": True}),
    "tied absent": Case({"tie_word_embeddings": ABSENT}),
    "tied null": Case({"tie_word_embeddings": None}, meant={}),
    "temperature off": Case({"attn_temperature_tuning": False}),
    "temperature 4": Case({"attn_temperature_tuning": 4}, meant={"attn_temperature_tuning": True}),
    "temperature 0": Case({"attn_temperature_tuning": 0}, meant={"attn_temperature_tuning": False}),
    "floor_scale as Meta writes it": Case({"floor_scale": 4.0}, meant={}),
    "qk norm off": Case({"use_qk_norm": False}),
    "qk norm absent": Case({"use_qk_norm": ABSENT}),
    "head_dim null": Case({"head_dim": None}, meant={"head_dim": 8}),
    "num_key_value_heads null": Case({"num_key_value_heads": None}, meant={"num_key_value_heads": 4}),
    "rms_norm_eps absent": Case({"rms_norm_eps": ABSENT}),
    "floor_scale and attn_scale absent": Case({"floor_scale": ABSENT, "attn_scale": ABSENT}),
    "eos one id": Case({"eos_token_id": 2}),
    "eos null": Case({"eos_token_id": None}),
    "pad -1": Case({"pad_token_id": -1}),
    "switches that are off": Case({"new_switch": False, "new_list": [], "new_dict": {}, "new_null": None, "_private": 5}),
    "nested": nested({}),
    "nested, image_token_id": nested({"image_token_index": ABSENT, "image_token_id": PATCH}),
    "nested, both image tokens": nested({"image_token_index": 7, "image_token_id": PATCH}),
    "nested, tied in the text part": nested({"text_config.tie_word_embeddings": True}),
    "nested, tied on top alone": nested({"tie_word_embeddings": True, "text_config.tie_word_embeddings": ABSENT}),
    "nested, tied on top against the text part": nested({"tie_word_embeddings": True}),
    "nested, vision rope_parameters": nested({"vision_config.rope_theta": ABSENT, "vision_config.rope_parameters": {"rope_theta": 9.0}}),
    "nested, vision rope absent": nested({"vision_config.rope_theta": ABSENT}),
    "nested, sides of the image": nested({"vision_config.image_size": [56, 56]}, meant={}),
    "nested, sides by name": nested({"vision_config.patch_size": {"height": 14, "width": 14}}, meant={}),
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Callable[[dict[str, Any]], torch.nn.Module]:
    """transformers' model of a `config.json`, made once for each."""

    @functools.lru_cache
    def make(text: str) -> torch.nn.Module:
        folder = tmp_path_factory.mktemp("theirs")
        (folder / "config.json").write_text(text)
        return make_model(AutoConfig.from_pretrained(folder))

    return lambda values: make(json.dumps(values))


@functools.lru_cache
def prompt(config: Config) -> tuple[np.ndarray, np.ndarray | None]:
    """Thirteen tokens and, if the model sees, a tile before them."""
    generator = np.random.default_rng(0)
    ids = generator.integers(4, 36, (1, 13)).astype(np.int32)
    if config.vision is None:
        return ids, None
    ids = np.concatenate([np.full((1, config.vision.tokens_per_tile), PATCH, np.int32), ids], axis=1)
    side = config.vision.image_size
    return ids, generator.uniform(-1, 1, (1, 3, side, side)).astype(np.float32)


@pytest.fixture(scope="module")
def ours() -> Callable[[Config, torch.nn.Module], np.ndarray]:
    """Our logits, computed once for all spellings of one model: their weights are the same."""
    found: dict[Any, np.ndarray] = {}

    def compute(config: Config, model: torch.nn.Module) -> np.ndarray:
        key = config.text, config.vision, config.image_token_index
        if key not in found:
            ids, tiles = prompt(config)
            with jax.disable_jit():  # no program per model: the same operations serve all, which takes a fifth of the time
                found[key] = np.asarray(port(model, config)(jnp.asarray(ids), tiles))
        return found[key]

    return compute


@pytest.mark.parametrize("name", LOADS)
def test_spellings_that_mean_something_mean_what_transformers_reads(name, tmp_path, theirs, ours):
    """A default of ours, a name that loses against another, or a null that is taken for a value."""
    case = LOADS[name]
    (tmp_path / "config.json").write_text(json.dumps(write(case.base, case.changes)))
    config = Config.from_directory(tmp_path)
    model = theirs(write(case.base, case.changes if case.meant is None else case.meant))
    ids, tiles = prompt(config)
    pictures = {} if tiles is None else {"pixel_values": torch.tensor(tiles)}
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids, dtype=torch.long), use_cache=False, **pictures).logits.numpy()
    np.testing.assert_allclose(ours(config, model), expected, atol=TOLERANCE, rtol=0)
