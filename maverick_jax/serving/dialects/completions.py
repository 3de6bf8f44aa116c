"""OpenAI's `/v1/completions`: texts or token ids that the model continues.

Source: OpenAI's API reference, the object `text_completion`; vLLM's `return_token_ids`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import MAX_NEW_TOKENS, Range, listed, shown, whole
from maverick_jax.serving import logprobs, sse
from maverick_jax.serving.answer import Portion
from maverick_jax.serving.failure import Failure, openai_body
from maverick_jax.serving.fields import Fields, token_ids
from maverick_jax.serving.job import Job
from maverick_jax.serving.reply import Reply
from maverick_jax.serving.routed import routed_experts
from maverick_jax.serving.settings import shared

URL = "/v1/completions"
SHORT = 16  # tokens of an answer without a limit of its own, as OpenAI's: a base model never ends by itself
LOGPROBS = Range(whole, 0, 20, "a whole number between 0 and 20")
IGNORED = ("suffix", "best_of")

failed = openai_body


def read(body: Any) -> Job:
    """
    Raises:
      UserError: a field of another kind, or no prompt.
    """
    fields = Fields(body, URL)
    settings = shared(fields)
    wanted = fields.number("logprobs", LOGPROBS)
    if wanted is not None:
        settings["sampling"]["logprobs"] = wanted
    echo = fields.flag("echo")
    if echo and settings["prompt_logprobs"] is None:
        settings["prompt_logprobs"] = wanted
    return Job(
        **settings,
        prompts=_prompts(fields.get("prompt")),
        echo=echo,
        max_new_tokens=fields.number("max_tokens", MAX_NEW_TOKENS, SHORT),
        unknown=fields.unknown(),
    )


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    items = listed(prompt) or []
    if items and all(whole(item) is not None for item in items):
        return [items]
    if not items or not all(isinstance(item, str | list) and item for item in items):
        raise UserError(f"prompt is {shown(prompt)}: expected a text, token ids, or a list of either.")
    return [item if isinstance(item, str) else token_ids(item, "prompt") for item in items]


def body_of(reply: Reply) -> dict[str, Any]:
    """What the client gets when all answers have ended."""
    choices = [
        _choice(reply, index, reply.prepared.echoes[index] + answer.text, Portion((), answer.tokens, answer.finish), first=True)
        for index, answer in enumerate(reply.answers)
    ]
    return _object(reply, choices) | {"usage": reply.usage}


class Stream:
    """The same as it comes."""

    def __init__(self, reply: Reply):
        self._reply = reply
        self._begun: set[int] = set()

    def begin(self) -> Iterable[bytes]:
        return ()

    def push(self, index: int, portion: Portion) -> Iterable[bytes]:
        first = index not in self._begun
        self._begun.add(index)
        text = "".join(part for part in portion.parts if isinstance(part, str))
        echo = self._reply.prepared.echoes[index] if first else ""
        if first or text or portion.tokens or portion.finish:
            yield sse.event(_object(self._reply, [_choice(self._reply, index, echo + text, portion, first=first)]))

    def end(self) -> Iterable[bytes]:
        if self._reply.job.stream_usage:
            yield sse.event(_object(self._reply, []) | {"usage": self._reply.usage})
        yield sse.DONE

    def fail(self, failure: Failure) -> Iterable[bytes]:
        return [sse.event(failed(failure)), sse.DONE]


def _object(reply: Reply, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": f"cmpl-{reply.key}", "object": "text_completion", "created": reply.created, "model": reply.model, "choices": choices}


def _choice(reply: Reply, index: int, text: str, portion: Portion, *, first: bool) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": portion.finish}
    handle, echo = reply.answers[index].handle, reply.prepared.echoes[index]
    if "logprobs" in reply.job.sampling:
        choice["logprobs"] = logprobs.of_completion(portion.tokens, reply.tokenizer, before=len(echo))
        if first and reply.job.echo:
            before = logprobs.echoed(handle.request.ids.tolist(), handle.prompt_logprobs, reply.tokenizer)
            choice["logprobs"] = {name: before[name] + values for name, values in choice["logprobs"].items()}
    if first and reply.job.prompt_logprobs is not None:
        choice["prompt_logprobs"] = logprobs.of_prompt(handle.request.ids.tolist(), handle.prompt_logprobs, reply.tokenizer)
    if reply.job.return_token_ids:
        choice["token_ids"] = [token.id for token in portion.tokens]
        choice |= {"prompt_token_ids": list(reply.prepared.requests[index].ids)} if first else {}
    return choice | (routed_experts(reply, index) if portion.finish else {})
