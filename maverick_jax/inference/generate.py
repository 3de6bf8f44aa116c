"""Continue prompts: a batch of requests for an engine that is as large as they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.inference.admission import check_model, pixels
from maverick_jax.inference.checks import MAX_NEW_TOKENS, check_room, names_the_nearest, stop_tokens, token_rows
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.request import Request
from maverick_jax.inference.sampling import Sampling
from maverick_jax.inference.sizes import next_power_of_two, round_up_context
from maverick_jax.model import Llama4
from maverick_jax.model.inputs import check_patches

SLOTS = 64  # prompts served at once; the others wait


@names_the_nearest
def generate(
    model: Llama4,
    prompts: Sequence[Sequence[int]],
    *,
    tiles: np.ndarray | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    min_tokens: int = 0,
    seed: int | Sequence[int] = 0,
    stop_ids: int | Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue a batch of prompts.

    Args:
      prompts: token ids per row, lists or arrays of whole numbers; rows may differ in length.
      tiles: [N, 3, S, S] float32, the tiles of all pictures of all rows, in order.
      max_new_tokens: at most so many tokens per row.
      temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, min_tokens, seed: see
        `Sampling`.
      stop_ids: token, or tokens, that end a row; None takes the config's, `()` never stops early.

    Returns:
      The new tokens of every row, without the stop token.

    Raises:
      UserError: an argument of another type or outside its range, an empty prompt, ids outside the vocabulary, no room in the
        context, tiles that do not fit the prompts; logits that are not finite (it names the first layer that is not).
    """
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=logit_bias,
        min_tokens=min_tokens,
        seed=seed,
    )
    check_model(model)
    config = model.config
    most = MAX_NEW_TOKENS.check("max_new_tokens", max_new_tokens)
    stop = None if stop_ids is None else stop_tokens(stop_ids, config.text.vocab_size)
    rows = token_rows(prompts, config.text.vocab_size)
    check_room(rows, most, config.text)
    shared = _tiles_by_row(rows, pixels(tiles, config), config)
    one_each = sampling.by_row(len(rows))
    if not rows:
        return []
    requests = [
        Request(ids=ids, tiles=own, max_new_tokens=most, sampling=one, stop_ids=stop)
        for ids, own, one in zip(rows, shared, one_each, strict=True)
    ]
    handles = engine_for(model, [len(ids) + most for ids in rows]).run(requests)
    for row, handle in enumerate(handles):
        handle.check(f"prompt {row}")
    return [handle.tokens for handle in handles]


def engine_for(model: Llama4, lengths: Sequence[int]) -> Engine:
    """An engine for rows of so many tokens: of sizes from short lists, so that other rows find its programs compiled."""
    slots = min(SLOTS, next_power_of_two(len(lengths)))
    max_length = min(round_up_context(max(lengths)), model.config.text.max_position_embeddings)
    return Engine(model, slots=slots, max_length=max_length, queue=len(lengths))


def _tiles_by_row(rows: Sequence[np.ndarray], tiles: np.ndarray | None, config: Config) -> list[np.ndarray | None]:
    """Each row's tiles, of those of all."""
    is_patch = [ids == config.image_token_index for ids in rows]
    check_patches(np.concatenate([np.zeros(0, bool), *is_patch]), tiles, config.vision)
    if tiles is None or config.vision is None:
        return [None] * len(rows)
    per_tile, found, start = config.vision.tokens_per_tile, [], 0
    for row, patches in enumerate(int(p.sum()) for p in is_patch):
        if patches % per_tile:
            raise UserError(f"prompt {row} has {patches} <|patch|> tokens: each tile takes {per_tile}, and belongs to one prompt.")
        found.append(tiles[start : start + patches // per_tile] if patches else None)
        start += patches // per_tile
    return found
