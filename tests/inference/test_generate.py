"""Generation: the tokens of transformers, for rows of any lengths, stopping where it should."""

import dataclasses

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from transformers import GenerationConfig, Llama4TextConfig

from maverick_jax.errors import UserError
from maverick_jax.inference import engine as engine_module
from maverick_jax.inference import pictures, steps
from maverick_jax.inference.generate import engine_for, generate
from maverick_jax.inference.request import Request
from maverick_jax.model.compiled import take_apart
from maverick_jax.sharding import make_mesh
from oracle.forward import text_ids
from oracle.pair import Pair, picture_prompt
from oracle.plain import SIDE, VISION, plain_model
from oracle.port import port
from oracle.tiny_checkpoints import make_model, text_values

NEW = 30
PROMPTS = [text_ids(1, length, seed=length)[0].tolist() for length in (20, 5, 31)]


def reference_tokens(pair: Pair, prompt: list[int], tiles: np.ndarray | None = None) -> list[int]:
    """transformers' own greedy generation of one row."""
    options = {} if tiles is None else {"pixel_values": torch.tensor(tiles)}
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=5)
    ids = torch.tensor([prompt])
    return pair.reference.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, **options)[
        0, len(prompt) :
    ].tolist()


@pytest.fixture(scope="module")
def small() -> Pair:
    """A dense RoPE layer and a NoPE layer with experts: the mechanics need no more."""
    reference = make_model(
        Llama4TextConfig(**text_values("maverick", num_hidden_layers=2, no_rope_layers=[1, 0], max_position_embeddings=160))
    )
    return Pair(reference, port(reference))


@pytest.fixture(scope="module")
def greedy(small) -> list[list[int]]:
    """What the small model says to `PROMPTS`, never stopping early."""
    return generate(small.model, PROMPTS, max_new_tokens=NEW, stop_ids=())


def test_a_batch_of_pictures_and_text_is_what_transformers_says(tiny):
    """Rows of different lengths, one with two pictures, 30 tokens each across chunk borders: as transformers one by one."""
    ids, tiles = picture_prompt()
    prompts = [PROMPTS[0], ids[0].tolist(), PROMPTS[1]]
    expected = [reference_tokens(tiny, prompt, tiles if row == 1 else None) for row, prompt in enumerate(prompts)]
    assert generate(tiny.model, prompts, tiles=tiles, max_new_tokens=NEW, stop_ids=()) == expected


def test_a_row_in_a_batch_is_as_if_alone(small, greedy):
    """Neither padding nor a neighbour changes a row."""
    assert greedy == [reference_tokens(small, prompt) for prompt in PROMPTS]
    assert [generate(small.model, [prompt], max_new_tokens=NEW, stop_ids=())[0] for prompt in PROMPTS] == greedy


def test_a_prompt_of_many_pieces(small, monkeypatch):
    """A long prompt goes in by several pieces, though a short neighbour ends in the first."""
    monkeypatch.setattr(engine_module, "pieces", lambda longest: (8,))
    prompts = [text_ids(1, 128)[0].tolist(), PROMPTS[1], text_ids(1, 64)[0].tolist()]  # 128 tokens of cache hold no answer
    assert generate(small.model, prompts, max_new_tokens=NEW, stop_ids=()) == [reference_tokens(small, prompt) for prompt in prompts]


def test_a_mesh_changes_no_token(small, greedy):
    """Cache, rows and experts laid out over eight devices."""
    model = port(small.reference, mesh=make_mesh(data=2, expert=2, tensor=2))
    assert generate(model, PROMPTS, max_new_tokens=NEW, stop_ids=()) == greedy


def test_stop_ids_end_each_row_for_itself(small, greedy):
    """The stop token is not among the results, and rows that have not met it go on."""
    stop = greedy[0][7]
    expected = [row[: row.index(stop)] if stop in row else row for row in greedy]
    assert generate(small.model, PROMPTS, max_new_tokens=NEW, stop_ids=[stop]) == expected
    assert len(expected[0]) <= 7


def test_stop_ids_of_the_config_are_the_default(small, greedy):
    """Without stop_ids a chat model would talk on behind its answer."""
    stop = greedy[1][9]
    model = port(small.reference, dataclasses.replace(small.config, eos_token_id=(stop,)))
    ended = generate(model, PROMPTS, max_new_tokens=NEW)
    assert ended[1] == greedy[1][: greedy[1].index(stop)]


@pytest.mark.parametrize("count", [1, 2, 8, 9, 17])
def test_max_new_tokens(small, greedy, count):
    """Decoding goes by several tokens per call; none too many may come out of the last one."""
    assert generate(small.model, PROMPTS, max_new_tokens=count, stop_ids=()) == [row[:count] for row in greedy]


def test_no_recompilation_within_a_bucket(small, greedy):
    """Prompts of the same lengths, or nearly, share their programs, whatever they say and however they are drawn from."""
    programs = (steps.prefill, steps.decode, steps.draw)
    generate(small.model, [PROMPTS[0][:3], PROMPTS[1], PROMPTS[2]], max_new_tokens=NEW, stop_ids=(), temperature=1.0)
    before = [program._cache_size() for program in programs]
    for length in (17, 25, 32):
        prompts = [PROMPTS[2][:9], PROMPTS[0][:1], (PROMPTS[2] * 2)[:length]]
        generate(small.model, prompts, max_new_tokens=NEW, stop_ids=(), temperature=0.1 * length, top_k=length)
    assert [program._cache_size() for program in programs] == before


def test_expert_loads_count_every_token_once(tiny):
    """Prompt and new tokens, without padding, the last new token is never fed back; the last layer skips what nobody reads."""
    engine = engine_for(tiny.model, [len(prompt) + NEW for prompt in PROMPTS])
    handles = engine.run([Request(ids=prompt, max_new_tokens=NEW, stop_ids=()) for prompt in PROMPTS])
    assert sum(handle.new_tokens for handle in handles) == 3 * NEW
    *others, last = engine.load_ME.sum(axis=1).tolist()
    assert others == [sum(map(len, PROMPTS)) + 3 * (NEW - 1)] * len(others) != []
    pieces = sum(-(-len(prompt) // tiny.config.text.attention_chunk_size) for prompt in PROMPTS)
    assert last == pieces + len(PROMPTS) * (NEW - 1)
    assert engine.dropped == 0


def test_tiles_of_many_calls_of_the_tower():
    """The tower takes sixteen tiles at a time: later ones are not the first ones again, and those that pad the last call are nobody's."""
    model = plain_model(vision=VISION)
    tiles = np.random.default_rng(0).uniform(-1, 1, (37, 3, SIDE, SIDE)).astype(np.float32)
    structure, leaves = take_apart(model)
    features = pictures.Features(lambda group: steps.encode(structure, leaves, group), steps.pick)
    found = features.of(pictures.digests(tiles), tiles)
    assert_allclose(np.concatenate(found), model.encode_tiles(tiles), atol=1e-6)
    again = np.array([30, 2, 30])
    assert_allclose(np.concatenate(features.of(pictures.digests(tiles[again]), tiles[again])), model.encode_tiles(tiles[again]), atol=1e-6)
    assert features.encoded == 37


def test_no_prompts_no_tokens(small):
    """An empty batch is no error."""
    assert generate(small.model, [], max_new_tokens=NEW) == []


def test_tiles_must_fit_the_prompts(tiny_maverick):
    """A picture too few or too many would be taken for another's."""
    ids, tiles = picture_prompt()
    with pytest.raises(UserError, match=r"32 <\|patch\|> tokens, the tiles make 28"):
        generate(tiny_maverick.model, [ids[0].tolist()], tiles=tiles[:7], max_new_tokens=1)
