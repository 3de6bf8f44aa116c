"""Answers as the engine draws them: tokens, how likely they were, and which experts made them.

They are drawn at temperature 1 from all tokens: from the model itself, so that what is learned from them is about the model.

Shape suffixes: A tokens of an answer, T tokens of prompt and answer but for the last, M layers with experts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from maverick_jax.inference.engine import Engine
from maverick_jax.inference.handle import Handle
from maverick_jax.inference.request import Request
from maverick_jax.inference.sampling import Sampling
from maverick_jax.model import Llama4
from maverick_jax.training.data.examples import Reading
from maverick_jax.training.rollouts.prompts import Prompt


class Answer(NamedTuple):
    """One answer to a prompt.

    Attributes:
      ids_A: int32, with the token that ended it, if one did.
      logprob_A: float32, of the sampler.
      text: without that token.
      expert_TM: unsigned, where the sampler sent the tokens; None if it was not asked.
    """

    ids_A: np.ndarray
    logprob_A: np.ndarray
    text: str
    expert_TM: np.ndarray | None = None


class Sampler:
    """An engine with the weights of a model that learns.

    Args:
      make_engine: for a model; called once.
    """

    def __init__(self, make_engine: Callable[[Llama4], Engine], reading: Reading, *, max_new_tokens: int):
        self.reading, self.max_new_tokens = reading, max_new_tokens
        self._make_engine = make_engine
        self._engine: Engine | None = None

    def __call__(self, model: Llama4, prompts: Sequence[Prompt], *, count: int, seed: int) -> Iterator[list[Answer]]:
        """Answers by the model as it is now; see `draw`."""
        if self._engine is None:
            self._engine = self._make_engine(model)
        self._engine.model = model  # which sees that its weights are others, and begins with an empty cache
        return draw(self._engine, prompts, self.reading, count=count, max_new_tokens=self.max_new_tokens, seed=seed)


def draw(
    engine: Engine, prompts: Sequence[Prompt], reading: Reading, *, count: int, max_new_tokens: int, seed: int
) -> Iterator[list[Answer]]:
    """For each prompt `count` answers. What is drawn follows from the prompt, the seed and the answer's number alone.

    An answer ends with a `<|patch|>` token too, should one be drawn: behind it a trainer would look for a picture.

    An engine that tells experts is asked for them: of a prompt those of its first answer, which the others share.
    """
    config = reading.config
    ends = [*config.eos_token_id, *([config.image_token_index] if config.image_token_index < config.text.vocab_size else [])]
    requests = []
    for prompt in prompts:
        tiles = np.concatenate(reading.tiles(prompt.pictures)) if prompt.tiles else None
        first_seed = zlib.crc32(prompt.ids.tobytes(), seed & 0xFFFFFFFF)
        if tiles is not None:  # the same words are asked about many pictures
            first_seed = zlib.crc32(tiles.tobytes(), first_seed)
        for number in range(count):
            request = Request(
                ids=prompt.ids,
                tiles=tiles,
                max_new_tokens=max_new_tokens,
                stop_ids=ends,
                sampling=Sampling(temperature=1.0, logprobs=0, seed=(first_seed + number) % 2**32),
                routed_experts_prompt_start=(len(prompt.ids) - 1 if number else 0) if engine.routed_experts else None,
            )
            requests.append(request)
    handles = engine.run(requests)
    for at, prompt in zip(range(0, len(handles), count), prompts, strict=True):
        group = handles[at : at + count]
        for handle in group:
            handle.check(prompt.name)
        before_TM = group[0].routed_experts[: len(prompt.ids) - 1] if engine.routed_experts else None
        yield [_answer(handle, before_TM, reading, first=handle is group[0]) for handle in group]


def _answer(handle: Handle, before_TM: np.ndarray | None, reading: Reading, *, first: bool) -> Answer:
    ids, likely = list(handle.tokens), [own for own, _ in handle.logprobs]
    if handle.stop_token is not None:
        assert handle.stop_logprob is not None
        ids, likely = [*ids, handle.stop_token], [*likely, handle.stop_logprob[0]]
    expert_TM = None
    if before_TM is not None:
        expert_TM = handle.routed_experts if first else np.concatenate([before_TM, handle.routed_experts])
    text = reading.tokenizer.decode(handle.tokens)
    return Answer(np.array(ids, np.int32), np.array(likely, np.float32), text, expert_TM)
