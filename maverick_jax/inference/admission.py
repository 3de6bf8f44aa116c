"""A request as a caller wrote it, checked against a model before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from maverick_jax.config import Config
from maverick_jax.errors import UserError
from maverick_jax.inference.checks import MAX_NEW_TOKENS, NoRoom, Range, shown, stop_tokens, token_rows, whole
from maverick_jax.inference.grammar import Grammar
from maverick_jax.inference.request import DEADLINE, PROMPT_LOGPROBS, Admitted, Request
from maverick_jax.inference.sampling import MOST_STOPS, Sampling
from maverick_jax.model import Llama4
from maverick_jax.model.inputs import check_patches, tiles_of


def check_model(model: Any) -> None:
    """The name of a directory is not yet a model."""
    if not isinstance(model, Llama4):
        raise UserError(f"model is {shown(model)}: open it with maverick_jax.load.")


def pixels(tiles: Any, config: Config) -> np.ndarray | None:
    """[N, 3, S, S] float32; None for no tiles."""
    found = None if tiles is None else tiles_of(tiles, config.vision)
    return None if found is None else np.asarray(found, np.float32)


def admitted(request: Any, config: Config, max_length: int, *, routed: bool = False, adapters: Sequence[str] = ()) -> Admitted:
    """The request with arrays for lists, and the config's stop tokens where it names none.

    Args:
      routed: whether the engine can tell experts.
      adapters: names of those that it has.

    Raises:
      UserError: a value of another type or outside its range, tiles that do not fit the prompt, no room in `max_length`, no such adapter.
    """
    if not isinstance(request, Request):
        raise UserError(f"request is {shown(request)}: give a maverick_jax.Request.")
    (ids,) = token_rows([request.ids], config.text.vocab_size)
    most = MAX_NEW_TOKENS.check("max_new_tokens", request.max_new_tokens)
    if len(ids) + most > max_length:
        raise NoRoom(
            f"the prompt has {len(ids)} tokens and up to {shown(most)} are asked for, but there is room for {max_length}: "
            "shorten the prompt or lower max_new_tokens."
        )
    tiles = pixels(request.tiles, config)
    check_patches(ids == config.image_token_index, tiles, config.vision)
    if not isinstance(request.sampling, Sampling) or not isinstance(request.sampling.seed, int):
        raise UserError(f"sampling is {shown(request.sampling)}: give a maverick_jax.Sampling with a single seed.")
    request.sampling.check_vocabulary(config.text.vocab_size)
    if not isinstance(request.grammar, Grammar | None):
        raise UserError(f"grammar is {shown(request.grammar)}: give a maverick_jax.Grammar.")
    stop = config.eos_token_id if request.stop_ids is None else request.stop_ids
    stop_ids = frozenset(stop_tokens(sorted(stop) if isinstance(stop, frozenset) else stop, config.text.vocab_size).tolist())
    if request.sampling.min_tokens and len(stop_ids) > MOST_STOPS:
        raise UserError(f"min_tokens keeps at most {MOST_STOPS} stop tokens away, and there are {len(stop_ids)}: leave some out.")
    scored = None if request.prompt_logprobs is None else PROMPT_LOGPROBS.check("prompt_logprobs", request.prompt_logprobs)
    first = request.routed_experts_prompt_start
    if first is not None and not routed:
        raise UserError(
            "routed_experts_prompt_start is given, and this engine tells no experts: make it with routed_experts=True (--routed-experts)."
        )
    if first is not None:
        first = Range(whole, 0, len(ids) - 1, f"a token of the prompt, between 0 and {len(ids) - 1}").check(
            "routed_experts_prompt_start", first
        )
    if request.adapter is not None and request.adapter not in adapters:
        raise UserError(f"adapter is {shown(request.adapter)}: this engine has {', '.join(adapters) or 'none; make it with adapters={…}'}.")
    deadline = None if request.deadline is None else DEADLINE.check("deadline", request.deadline)
    rest = {"sampling": request.sampling, "grammar": request.grammar, "prompt_logprobs": scored, "routed_experts_prompt_start": first}
    return Admitted(ids=ids, tiles=tiles, max_new_tokens=most, stop_ids=stop_ids, deadline=deadline, adapter=request.adapter, **rest)
