"""What a request asks for, whatever the dialect it was written in."""

from __future__ import annotations

import dataclasses
from typing import Any

from maverick_jax.inference.grammar import Grammar
from maverick_jax.serving.tools.choice import NO_TOOLS, Tools


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One request: of a conversation, or of prompts.

    Attributes:
      model: its name, if the request has one.
      messages: of a conversation, as `render` takes them, but for pictures that are elsewhere, which are `Address`es.
      prompts: texts or token ids.
      tools: what the model may call.
      render: other settings of `render`.
      sampling: settings of `Sampling` by name, as they were given; their values are for it to check.
      max_new_tokens: None for as many as there is room for.
      stop: texts that end an answer.
      stop_ids: tokens that do so besides the model's own.
      ignore_eos: whether the model's own do not.
      answers: to each prompt.
      echo: whether the prompt is part of a completion's text.
      grammar: the form of the answer.
      prompt_logprobs: how many of the likeliest tokens come with each token of the prompt, and its own log-probability; None: none.
      stream: whether the answer is wanted as it comes.
      stream_usage: whether a stream ends with what it cost.
      return_token_ids: whether the answer comes as token ids too, the one that ended it among them.
      routed_experts_prompt_start: as of a `Request`; None leaves it to the server.
      repeated: fields of the request that the answer repeats.
      unknown: a line for each field that has no effect, since nobody knows it.
    """

    model: str | None = None
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    prompts: list[str | list[int]] = dataclasses.field(default_factory=list)
    tools: Tools = NO_TOOLS
    render: dict[str, Any] = dataclasses.field(default_factory=dict)
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    answers: int = 1
    echo: bool = False
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None
    stream: bool = False
    stream_usage: bool = False
    return_token_ids: bool = False
    routed_experts_prompt_start: int | None = None
    repeated: dict[str, Any] = dataclasses.field(default_factory=dict)
    unknown: tuple[str, ...] = ()
