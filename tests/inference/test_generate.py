"""Generation: the tokens of transformers, for rows of any lengths, stopping where it should."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, Llama4TextConfig

from maverick_jax.errors import UserError
from maverick_jax.inference import generate as generation
from maverick_jax.inference.generate import Generation, generate
from maverick_jax.sharding import make_mesh
from oracle.pair import Pair, picture_prompt, text_ids
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
    monkeypatch.setattr(generation, "PIECE", 32)  # 32 per row, the shortest
    prompts = [text_ids(1, 100)[0].tolist(), PROMPTS[1], text_ids(1, 64)[0].tolist()]
    assert generate(small.model, prompts, max_new_tokens=NEW, stop_ids=()) == [reference_tokens(small, prompt) for prompt in prompts]


def test_a_mesh_changes_no_token(small, greedy):
    """Cache, rows and experts laid out over eight devices."""
    model = port(small.reference, mesh=make_mesh(data=2, expert=2, tensor=2))
    run = Generation(model, PROMPTS, max_new_tokens=NEW, stop_ids=())
    assert [list(itertools.chain(*row)) for row in zip(*run, strict=True)] == greedy
    assert run.dropped == 0


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


def test_sampled_rows_are_reproducible_and_differ(small):
    """The seed decides: the same again, another for another seed, and for another row of the same prompt."""
    prompts = [PROMPTS[0]] * 3
    settings = dict(max_new_tokens=12, temperature=1.5, stop_ids=())
    first = generate(small.model, prompts, seed=1, **settings)
    assert first == generate(small.model, prompts, seed=1, **settings)
    assert first != generate(small.model, prompts, seed=2, **settings)
    assert first[0] != first[1] != first[2]


def test_no_recompilation_within_a_bucket(small, greedy):
    """Prompts of up to 32 tokens share one program, whatever their lengths and settings."""
    sizes = generation._prefill_piece._cache_size(), generation._decode._cache_size()
    for length in (1, 7, 32):
        prompts = [PROMPTS[0][:3], PROMPTS[1], (PROMPTS[2] * 2)[:length]]
        generate(small.model, prompts, max_new_tokens=NEW, stop_ids=(), temperature=0.1 * length, top_k=length)
    assert (generation._prefill_piece._cache_size(), generation._decode._cache_size()) == sizes


def test_expert_loads_count_every_token_once(tiny):
    """Prompt and new tokens, without padding, the last new token is never fed back; the last layer skips what nobody reads."""
    run = Generation(tiny.model, PROMPTS, max_new_tokens=NEW, stop_ids=())
    assert sum(len(row) for portion in run for row in portion) == run.new_tokens == 3 * NEW
    *others, last = run.load_ME.sum(axis=1).tolist()
    assert others == [run.prompt_tokens + 3 * (NEW - 1)] * len(others) != []
    assert last == len(PROMPTS) * NEW
    assert run.dropped == 0


def test_no_prompts_no_tokens(small):
    """An empty batch is no error."""
    assert generate(small.model, [], max_new_tokens=NEW) == []


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 1024]], {}, r"token ids outside 0\.\.1023"),
        ([[-1]], {}, r"token ids outside 0\.\.1023"),
        ([[1] * 140], {}, "prompt 0 has 140 tokens and up to 30 are asked for, but the context holds 160"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens is 0"),
        ([[1]], dict(temperature=-1.0), "temperature is -1.0"),
        ([[1]], dict(tiles=np.zeros((1, 3, 56, 56), np.float32)), "no vision tower"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(small, prompts, options, message):
    """One line that says what is wrong with which prompt."""
    with pytest.raises(UserError, match=message):
        generate(small.model, prompts, **{"max_new_tokens": NEW, **options})


def test_tiles_must_fit_the_prompts(tiny_maverick):
    """A picture too few or too many would be taken for another's."""
    ids, tiles = picture_prompt()
    with pytest.raises(UserError, match=r"32 <\|patch\|> tokens, the tiles make 28"):
        generate(tiny_maverick.model, [ids[0].tolist()], tiles=tiles[:7], max_new_tokens=1)
