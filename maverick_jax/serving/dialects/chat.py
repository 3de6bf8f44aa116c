"""OpenAI's `/v1/chat/completions`: a conversation, with pictures and tools, that the assistant continues.

Source: OpenAI's API reference, the objects `chat.completion` and `chat.completion.chunk`; vLLM's `return_token_ids`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import MAX_NEW_TOKENS, Range, shown, whole
from maverick_jax.serving import logprobs, sse
from maverick_jax.serving.answer import Answer, Call, Portion, Token
from maverick_jax.serving.failure import Failure, openai_body
from maverick_jax.serving.fields import Fields
from maverick_jax.serving.job import Job
from maverick_jax.serving.pictures import picture_at
from maverick_jax.serving.reply import Reply
from maverick_jax.serving.routed import routed_experts
from maverick_jax.serving.settings import chosen_tools, shared
from maverick_jax.serving.tools.choice import arguments_of
from maverick_jax.serving.tools.reader import CallDelta

URL = "/v1/chat/completions"
LOGPROBS = Range(whole, 0, 20, "a whole number between 0 and 20")
IGNORED = ("modalities", "functions", "function_call", "prediction", "web_search_options")

failed = openai_body


def read(body: Any) -> Job:
    """
    Raises:
      UserError: a field of another kind, or no messages.
    """
    fields = Fields(body, URL)
    settings = shared(fields)
    most = fields.number("top_logprobs", LOGPROBS)
    if fields.flag("logprobs"):
        settings["sampling"]["logprobs"] = most or 0
    elif most:
        raise UserError("top_logprobs is given without logprobs: set logprobs to true.")
    if kwargs := fields.get("chat_template_kwargs", {}):
        raise UserError(f"chat_template_kwargs is {shown(kwargs)}: chat templates take no settings of their own here.")
    messages = fields.items("messages")
    if not messages:
        raise UserError("messages has none: expected a list of at least one message.")
    fields.ignore(IGNORED)
    return Job(
        **settings,
        messages=[_message(message) for message in messages],
        tools=chosen_tools(fields, inner="function"),
        render={name: fields.flag(name) for name in ("continue_final_message", "add_generation_prompt") if fields.has(name)},
        max_new_tokens=_longest(fields),
        unknown=fields.unknown(),
    )


def _longest(fields: Fields) -> int | None:
    old, new = (fields.number(name, MAX_NEW_TOKENS) for name in ("max_tokens", "max_completion_tokens"))
    if old is not None and new is not None and old != new:
        raise UserError("both max_tokens and max_completion_tokens are given: give one of them.")
    return old or new


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"messages holds {shown(message)}: expected objects with a role and a content.")
    message = message | {"role": "system"} if message["role"] == "developer" else message
    if isinstance(parts := message.get("content"), list):
        message = message | {"content": [_part(part) for part in parts]}
    if (calls := message.get("tool_calls")) is not None:
        if not isinstance(calls, list):
            raise UserError(f"messages holds tool_calls that are {shown(calls)}: expected a list.")
        message = message | {"tool_calls": [_call(call) for call in calls]}
    return message


def _call(call: Any) -> dict[str, Any]:
    """A tool's arguments as an object, which OpenAI writes as JSON in a text."""
    match call:
        case {"function": {"name": str(), "arguments": str() as text} as given}:
            return call | {"function": given | {"arguments": arguments_of(text)}}
        case {"function": {"name": str()} as given} if isinstance(given.get("arguments"), dict | None):
            return call
    raise UserError(f"messages holds the tool call {shown(call)}: expected an object with a function, its name and its arguments.")


def _part(part: Any) -> Any:
    """Pictures as bytes or addresses; other parts are for `render` to understand."""
    match part:
        case {"type": "image_url" | "image" | "input_image" as kind}:
            place = part.get(kind, part.get("image_url"))
            return {"type": "image", "image": picture_at(place.get("url") if isinstance(place, dict) else place)}
        case {"type": "file", "file": {"file_data": data}}:
            return {"type": "image", "image": picture_at(data)}
        case {"type": "refusal", "refusal": str() as text}:
            return {"type": "text", "text": text}
    return part


def body_of(reply: Reply) -> dict[str, Any]:
    """What the client gets when all answers have ended."""
    choices = [
        _choice(reply, index, {"message": _said(answer)}, answer.tokens, answer.finish) for index, answer in enumerate(reply.answers)
    ]
    return _object(reply, "chat.completion", choices) | {"usage": reply.usage} | _prompt_ids(reply) | _prompt_logprobs(reply)


def _said(answer: Answer) -> dict[str, Any]:
    calls = [part for part in answer.said if isinstance(part, Call)]
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or (None if calls else ""), "refusal": None}
    if calls:
        message["tool_calls"] = [_call_object(call.id, call.name, call.arguments) for call in calls]
    return message


class Stream:
    """The same as it comes."""

    def __init__(self, reply: Reply):
        self._reply = reply

    def begin(self) -> Iterable[bytes]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        for index in range(len(self._reply.answers)):
            yield self._chunk([_choice(self._reply, index, {"delta": delta}, (), None)], _prompt_ids(self._reply))

    def push(self, index: int, portion: Portion) -> Iterable[bytes]:
        tokens = portion.tokens
        for part in portion.parts:
            delta = {"tool_calls": [_call_delta(part)]} if isinstance(part, CallDelta) else {"content": part}
            yield self._chunk([_choice(self._reply, index, {"delta": delta}, tokens, None)])
            tokens = ()
        if portion.finish:
            yield self._chunk([_choice(self._reply, index, {"delta": {}}, tokens, portion.finish)])
        elif tokens and (self._reply.job.return_token_ids or "logprobs" in self._reply.job.sampling):
            yield self._chunk([_choice(self._reply, index, {"delta": {}}, tokens, None)])

    def end(self) -> Iterable[bytes]:
        if scores := _prompt_logprobs(self._reply):
            yield self._chunk([], scores)
        if self._reply.job.stream_usage:
            yield self._chunk([], {"usage": self._reply.usage})
        yield sse.DONE

    def fail(self, failure: Failure) -> Iterable[bytes]:
        return [sse.event(failed(failure)), sse.DONE]

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any] | None = None) -> bytes:
        return sse.event(_object(self._reply, "chat.completion.chunk", choices) | (more or {}))


def _object(reply: Reply, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": f"chatcmpl-{reply.key}", "object": kind, "created": reply.created, "model": reply.model, "choices": choices}


def _choice(reply: Reply, index: int, said: dict[str, Any], tokens: Iterable[Token], finish: str | None) -> dict[str, Any]:
    choice = {"index": index, **said, "logprobs": None, "finish_reason": finish}
    if "logprobs" in reply.job.sampling:
        choice["logprobs"] = {"content": logprobs.of_chat(tokens, reply.tokenizer), "refusal": None}
    if reply.job.return_token_ids:
        choice["token_ids"] = [token.id for token in tokens]
    return choice | (routed_experts(reply, index) if finish else {})


def _prompt_ids(reply: Reply) -> dict[str, Any]:
    return {"prompt_token_ids": list(reply.prepared.requests[0].ids)} if reply.job.return_token_ids else {}


def _prompt_logprobs(reply: Reply) -> dict[str, Any]:
    handle = reply.answers[0].handle
    if reply.job.prompt_logprobs is None:
        return {}
    return {"prompt_logprobs": logprobs.of_prompt(handle.request.ids.tolist(), handle.prompt_logprobs, reply.tokenizer)}


def _call_object(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _call_delta(part: CallDelta) -> dict[str, Any]:
    """The first part names the call, the others are arguments alone."""
    begun = _call_object(part.id, part.name, part.arguments) if part.name else {"function": {"arguments": part.arguments}}
    return {"index": part.call} | begun
