"""OpenAI's `/v1/responses`, without a memory of earlier ones: what Codex and the Agents SDK speak.

Source: OpenAI's API reference, the object `response` and its streaming events.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import MAX_NEW_TOKENS, shown
from maverick_jax.inference.grammar import Grammar
from maverick_jax.serving import sse
from maverick_jax.serving.answer import Call, Portion
from maverick_jax.serving.failure import Failure, openai_body
from maverick_jax.serving.fields import Fields
from maverick_jax.serving.job import Job
from maverick_jax.serving.pictures import picture_at
from maverick_jax.serving.reply import Reply
from maverick_jax.serving.settings import IGNORED, chosen_tools, form, sampling
from maverick_jax.serving.tools.choice import arguments_of

URL = "/v1/responses"
STATELESS = ("previous_response_id", "conversation", "background", "prompt")  # what needs a memory
REPEATED = {  # by the answer, as they were given, or so
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
ROLES = {"developer": "system"}
failed = openai_body


def read(body: Any) -> Job:
    """
    Raises:
      UserError: a field of another kind, no input, or one that continues an earlier response.
    """
    fields = Fields(body, URL)
    fields.ignore(IGNORED | {"include", "client_metadata", "stream_options", *REPEATED})
    for name in STATELESS:
        if fields.get(name):
            raise UserError(f"{name} is given, and nothing is remembered here: send the whole conversation as input.")
    written = Fields(fields.get("text", {}), "text")
    instructions = fields.text("instructions")
    messages = [{"role": "system", "content": instructions}] if instructions else []
    return Job(
        model=fields.text("model") or None,
        messages=messages + _messages(fields),
        tools=chosen_tools(fields),
        sampling=sampling(fields),
        max_new_tokens=fields.number("max_output_tokens", MAX_NEW_TOKENS),
        grammar=_grammar(written.get("format")),
        stream=fields.flag("stream"),
        repeated={name: fields.get(name, usual) for name, usual in REPEATED.items()},
        unknown=fields.unknown(),
    )


def _grammar(wanted: Any) -> Grammar | None:
    match wanted:
        case {"type": "json_schema", "schema": schema}:
            return form({"type": "json_schema", "json_schema": {"schema": schema}}, "text.format")
    return form(wanted, "text.format")


def _messages(fields: Fields) -> list[dict[str, Any]]:
    """Of the items of the input; calls that follow each other are one message."""
    given = fields.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not items:
        raise UserError(f"input is {shown(given)}: expected a text, or a list of at least one item.")
    messages: list[dict[str, Any]] = []
    for item in items:
        match item:
            case {"type": "function_call", "call_id": id, "name": str() as name, "arguments": str() as arguments}:
                call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments_of(arguments)}}
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                messages[-1].setdefault("tool_calls", []).append(call)
            case {"type": "function_call_output", "call_id": id, "output": output}:
                messages.append({"role": "tool", "tool_call_id": id, "content": _content(output)})
            case {"role": str() as role, "content": content} if item.get("type", "message") == "message":
                messages.append({"role": ROLES.get(role, role), "content": _content(content)})
            case {"type": str()} if item["type"] not in ("message", "function_call", "function_call_output"):
                fields.note(f"input holds {shown(item)}, which is passed over.")
            case _:
                raise UserError(f"input holds {shown(item)}: expected messages, calls of functions and what they gave.")
    if not messages:
        raise UserError("input has no message: expected one at least.")
    return messages


def _content(content: Any) -> Any:
    return [_part(part) for part in content] if isinstance(content, list) else content


def _part(part: Any) -> Any:
    match part:
        case {"type": "input_text" | "output_text" | "text", "text": str() as text} | {"type": "refusal", "refusal": str() as text}:
            return {"type": "text", "text": text}
        case {"type": "input_image", "image_url": url} | {"type": "input_file", "file_data": url}:
            return {"type": "image", "image": picture_at(url)}
    return part


def body_of(reply: Reply) -> dict[str, Any]:
    """What the client gets when the answer has ended."""
    (answer,) = reply.answers
    output = [_call(part, "completed") if isinstance(part, Call) else _message(part, "completed") for part in answer.said]
    return _response(reply, output, answer.finish)


class Stream:
    """The same as it comes."""

    def __init__(self, reply: Reply):
        self._reply = reply
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._open = False  # the last item of the output is being written

    def begin(self) -> Iterable[bytes]:
        for name in ("created", "in_progress"):
            yield self._event(name, response=_response(self._reply, [], None))

    def push(self, index: int, portion: Portion) -> Iterable[bytes]:
        for part in portion.parts:
            if isinstance(part, str):
                if not (self._open and self._item["type"] == "message"):
                    yield from self._close()
                    yield from self._begin(_message("", "in_progress"))
                    yield self._of_item("content_part.added", content_index=0, part=_text(""))
                self._item["content"][0]["text"] += part
                yield self._of_item("output_text.delta", content_index=0, delta=part, logprobs=[])
            else:
                if part.name:
                    yield from self._close()
                    yield from self._begin(_call(Call(part.id, part.name, ""), "in_progress"))
                if part.arguments:
                    self._item["arguments"] += part.arguments
                    yield self._of_item("function_call_arguments.delta", delta=part.arguments)
        if portion.finish:
            yield from self._close()

    def end(self) -> Iterable[bytes]:
        response = _response(self._reply, self._output, self._reply.answers[0].finish)
        yield self._event(response["status"], response=response)

    def fail(self, failure: Failure) -> Iterable[bytes]:
        error = {"code": failure.kind, "message": failure.message}
        yield self._event("failed", response=_response(self._reply, self._output, None) | {"status": "failed", "error": error})

    @property
    def _item(self) -> dict[str, Any]:
        return self._output[-1]

    def _begin(self, item: dict[str, Any]) -> Iterable[bytes]:
        self._output.append(item)
        self._open = True
        blank = item | {"content": []} if item["type"] == "message" else item
        yield self._event("output_item.added", output_index=len(self._output) - 1, item=blank)

    def _close(self) -> Iterable[bytes]:
        if not self._open:
            return
        self._open = False
        item = self._item
        item["status"] = "completed"
        if item["type"] == "message":
            (part,) = item["content"]
            yield self._of_item("output_text.done", content_index=0, text=part["text"], logprobs=[])
            yield self._of_item("content_part.done", content_index=0, part=part)
        else:
            yield self._of_item("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        yield self._event("output_item.done", output_index=len(self._output) - 1, item=item)

    def _of_item(self, kind: str, **values: Any) -> bytes:
        return self._event(kind, item_id=self._item["id"], output_index=len(self._output) - 1, **values)

    def _event(self, kind: str, **values: Any) -> bytes:
        kind = f"response.{kind}"
        self._number += 1
        return sse.event({"type": kind, "sequence_number": self._number - 1, **values}, kind)


def _response(reply: Reply, output: list[dict[str, Any]], finish: str | None) -> dict[str, Any]:
    status = {None: "in_progress", "length": "incomplete"}.get(finish, "completed")
    return {
        "id": f"resp_{reply.key}",
        "object": "response",
        "created_at": reply.created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": reply.model,
        "output": output,
        "background": False,
        "previous_response_id": None,
        "store": False,
        **reply.job.repeated,
        "usage": None if finish is None else _usage(reply),
    }


def _usage(reply: Reply) -> dict[str, Any]:
    return {
        "input_tokens": reply.prompt_tokens,
        "input_tokens_details": {"cached_tokens": reply.cached_tokens},
        "output_tokens": reply.new_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": reply.prompt_tokens + reply.new_tokens,
    }


def _message(text: str, status: str) -> dict[str, Any]:
    return {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "status": status, "role": "assistant", "content": [_text(text)]}


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(call: Call, status: str) -> dict[str, Any]:
    named = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
    return {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": status, **named}
