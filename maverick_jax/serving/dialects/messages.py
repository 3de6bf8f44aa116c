"""Anthropic's `/v1/messages`: what Claude Code and Anthropic's clients speak.

Source: Anthropic's API reference, the object `message` and its streaming events.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import MAX_NEW_TOKENS, shown, stop_strings
from maverick_jax.inference.grammar import Grammar
from maverick_jax.serving import sse
from maverick_jax.serving.answer import Answer, Call, Portion
from maverick_jax.serving.failure import Failure
from maverick_jax.serving.fields import Fields
from maverick_jax.serving.job import Job
from maverick_jax.serving.pictures import decoded, picture_at
from maverick_jax.serving.reply import Reply
from maverick_jax.serving.tools.choice import Tools, arguments_of, function, tools

URL = "/v1/messages"
IGNORED = "metadata thinking context_management service_tier container mcp_servers betas speed inference_geo cache_control".split()
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
KINDS = {413: "request_too_large", 500: "api_error", 503: "overloaded_error"}
PASSED_OVER = ("thinking", "redacted_thinking")  # blocks of other models


def failed(failure: Failure) -> dict[str, Any]:
    """The body that says it."""
    return {"type": "error", "error": {"type": KINDS.get(failure.status, failure.kind), "message": failure.message}, "request_id": None}


def read(body: Any, *, answered: bool = True) -> Job:
    """
    Args:
      answered: an answer is wanted, and must have a limit.

    Raises:
      UserError: a field of another kind, or one that is missing.
    """
    fields = Fields(body, URL)
    fields.ignore(IGNORED)
    if answered and not fields.has("max_tokens"):
        raise UserError("max_tokens is missing: say how long the answer may be.")
    messages = _system(fields) + [message for given in fields.items("messages") for message in _messages(given)]
    if not fields.items("messages"):
        raise UserError("messages has none: expected a list of at least one message.")
    settings = {"temperature": fields.get("temperature", 1.0)} | {name: fields.get(name) for name in ("top_p", "top_k") if fields.has(name)}
    return Job(
        model=fields.text("model") or None,
        messages=messages,
        tools=_tools(fields),
        render={"continue_final_message": True} if messages[-1]["role"] == "assistant" else {},
        sampling=settings,
        max_new_tokens=fields.number("max_tokens", MAX_NEW_TOKENS),
        stop=stop_strings(fields.get("stop_sequences", ())),
        grammar=_grammar(fields),
        stream=fields.flag("stream"),
        unknown=fields.unknown(),
    )


def _grammar(fields: Fields) -> Grammar | None:
    wanted = fields.get("output_format", Fields(fields.get("output_config", {}), "output_config").get("format"))
    match wanted:
        case None:
            return None
        case {"type": "json_schema", "schema": schema}:
            return Grammar(json_schema=schema)
    raise UserError(f"output_config has the format {shown(wanted)}: expected type json_schema with a schema.")


def _tools(fields: Fields) -> Tools:
    functions = []
    for tool in fields.objects("tools"):
        if tool.get("type", "custom") == "custom":
            functions.append(function(tool, "tools", parameters="input_schema"))
        else:
            fields.note(f"tools holds {shown(tool)}, which is a tool of another server: the model is not told of it.")
    choice = Fields(fields.get("tool_choice", {"type": "auto" if functions else "none"}), "tool_choice")
    parallel = not choice.flag("disable_parallel_tool_use")
    match choice.get("type"):
        case "auto" | "none" as mode:
            return tools(functions, mode, parallel=parallel)
        case "any":
            return tools(functions, "required", parallel=parallel)
        case "tool":
            return tools(functions, "required", [choice.text("name")], parallel=False)
        case kind:
            raise UserError(f"tool_choice has the type {shown(kind)}: expected auto, any, tool or none.")


def _system(fields: Fields) -> list[dict[str, Any]]:
    given = fields.get("system", "")
    if isinstance(given, list):
        given = [_block(block) for block in given]
    elif not isinstance(given, str):
        raise UserError(f"system is {shown(given)}: expected a text, or a list of blocks of text.")
    return [{"role": "system", "content": given}] if given else []


def _messages(message: Any) -> list[dict[str, Any]]:
    """What a message is to a chat template: results of tools are messages of their own, in front of what else it says."""
    roles = ("user", "assistant", "system")
    if not isinstance(message, dict) or message.get("role") not in roles or message.get("content") is None:
        raise UserError(f"messages holds {shown(message)}: expected objects with the role user or assistant, and a content.")
    role, content = message["role"], message.get("content")
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    results, said, calls = [], [], []
    for block in content:
        match block:
            case {"type": "tool_result", "tool_use_id": id}:
                texts, pictures = _result(block.get("content"))
                results.append({"role": "tool", "tool_call_id": id, "content": texts})
                said += pictures
            case {"type": "tool_use", "id": id, "name": str() as name, "input": dict() as arguments}:
                calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
            case {"type": str() as kind} if kind in PASSED_OVER:
                pass
            case _:
                said.append(_block(block))
    rest = [{"role": role, "content": said or None, **({"tool_calls": calls} if calls else {})}] if said or calls or not results else []
    return results + rest


def _result(content: Any) -> tuple[Any, list[dict[str, Any]]]:
    """What a tool gave, and pictures among it, which stand in a user's message."""
    if not isinstance(content, list | str | None):
        raise UserError(f"a tool_result has the content {shown(content)}: expected a text, or a list of blocks.")
    if not isinstance(content, list):
        return content or "", []
    blocks = [_block(block) for block in content]
    return [block for block in blocks if block["type"] == "text"], [block for block in blocks if block["type"] == "image"]


def _block(block: Any) -> dict[str, Any]:
    match block:
        case {"type": "text", "text": str() as text} | {"type": "document", "source": {"type": "text", "data": str() as text}}:
            return {"type": "text", "text": text}
        case {"type": "image", "source": {"type": "base64", "data": data}}:
            return {"type": "image", "image": decoded(data)}
        case {"type": "image", "source": {"type": "url", "url": url}}:
            return {"type": "image", "image": picture_at(url)}
    raise UserError(f"a content holds {shown(block)}: expected text, image, tool_use and tool_result blocks.")


def body_of(reply: Reply) -> dict[str, Any]:
    """What the client gets when the answer has ended."""
    (answer,) = reply.answers
    content = [
        _tool_use(part) | {"input": _input(part.arguments)} if isinstance(part, Call) else {"type": "text", "text": part}
        for part in answer.said
    ]
    return _message(reply, content) | _ending(answer) | {"usage": _usage(reply)}


def _input(arguments: str) -> dict[str, Any]:
    """Arguments as an object; of a call that was cut off, nothing."""
    try:
        return arguments_of(arguments)
    except UserError:
        return {}


class Stream:
    """The same as it comes."""

    def __init__(self, reply: Reply):
        self._reply = reply
        self._blocks = 0
        self._open: str | None = None  # the kind of the block that is being written

    def begin(self) -> Iterable[bytes]:
        yield _event("message_start", message=_message(self._reply, []) | {"usage": _usage(self._reply)})

    def push(self, index: int, portion: Portion) -> Iterable[bytes]:
        for part in portion.parts:
            if isinstance(part, str):
                if self._open != "text":
                    yield from self._begin({"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": part})
            else:
                if part.name:
                    yield from self._begin(_tool_use(Call(part.id, part.name, "")))
                if part.arguments:
                    yield self._delta({"type": "input_json_delta", "partial_json": part.arguments})

    def end(self) -> Iterable[bytes]:
        yield from self._close()
        yield _event("message_delta", delta=_ending(self._reply.answers[0]), usage=_usage(self._reply))
        yield _event("message_stop")

    def fail(self, failure: Failure) -> Iterable[bytes]:
        yield sse.event(failed(failure), "error")

    def _begin(self, block: dict[str, Any]) -> Iterable[bytes]:
        yield from self._close()
        self._blocks += 1
        self._open = block["type"]
        yield _event("content_block_start", index=self._blocks - 1, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _close(self) -> Iterable[bytes]:
        if self._open:
            self._open = None
            yield _event("content_block_stop", index=self._blocks - 1)


def _event(kind: str, **values: Any) -> bytes:
    return sse.event({"type": kind, **values}, kind)


def _message(reply: Reply, content: list[dict[str, Any]]) -> dict[str, Any]:
    named = {"id": f"msg_{reply.key}", "type": "message", "role": "assistant", "model": reply.model}
    return named | {"content": content, "stop_reason": None, "stop_sequence": None}


def _tool_use(call: Call) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}


def _ending(answer: Answer) -> dict[str, Any]:
    reason = "stop_sequence" if answer.stop_text is not None and answer.finish == "stop" else REASONS[answer.finish or "stop"]
    return {"stop_reason": reason, "stop_sequence": answer.stop_text}


def _usage(reply: Reply) -> dict[str, Any]:
    """Tokens that were in the cache are counted apart from the others."""
    cached = reply.cached_tokens
    return {
        "input_tokens": reply.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": reply.new_tokens,
    }
