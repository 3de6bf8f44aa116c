"""The chat format of the releases, for checkpoints without a template of their own.

Sources: Llama 4 reference, `models/llama4/chat_format.py` and `prompt_format.md`; spec section 4.3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.prompt.tokenizer import Tokenizer

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython", "ipython": "ipython"}
TOOLS = "Here is a list of functions in JSON format that you can invoke.\n\n{functions}\n\n{manner}"
MANNER = (
    'To invoke one, answer with {"type": "function", "name": function name, "parameters": dictionary of argument name and its value} '
    "and nothing else. Do not use variables."
)


def encode_dialog(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Any] | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> list[int]:
    """Token ids of a conversation, with one `<|image|>` for every picture.

    Header and content are encoded apart from each other, so that a content's first line break does not join the header's.

    Raises:
      UserError: a message that the format has no place for.
    """
    begin, open_header, close_header, end_of_message, end_of_turn, image = (
        tokenizer.id_of(f"<|{name}|>") for name in ("begin_of_text", "header_start", "header_end", "eom", "eot", "image")
    )

    def header(role: str) -> list[int]:
        return [open_header, *tokenizer.encode(role), close_header, *tokenizer.encode("\n\n")]

    ids = [begin]
    for message in _with_tools(messages, tools):
        role = ROLES.get(message["role"])
        if role is None:
            raise UserError(f"role {message['role']!r} is unknown to the format of the releases: use one of {', '.join(ROLES)}.")
        ids += header(role)
        for text in _contents(message):
            ids += [image] if text is None else tokenizer.encode(text)
        calls = message.get("tool_calls") or []
        if not isinstance(calls, (list, tuple)):
            raise UserError(f"tool_calls is a {type(calls).__name__}: give a list of calls.")
        for call in calls:
            ids += tokenizer.encode(_call(call))
        ids.append(end_of_message if calls or role == "ipython" else end_of_turn)
    if continue_final_message:
        return ids[:-1]
    return ids + header("assistant") if add_generation_prompt else ids


def _with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> list[Mapping[str, Any]]:
    """The messages, the first of them a system message that lists the tools, behind what it says already."""
    if not tools:
        return list(messages)
    functions = [tool.get("function", tool) for tool in tools]
    listed = TOOLS.format(functions=_json(functions, indent=4), manner=MANNER)
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": listed}, *messages]
    said = list(_contents(messages[0]))
    parts = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in said]
    between = "\n\n" if said else ""
    return [{"role": "system", "content": [*parts, {"type": "text", "text": between + listed}]}, *messages[1:]]


def _contents(message: Mapping[str, Any]) -> Iterator[str | None]:
    """The texts of a message in order, None where a picture stands. A tool's result that is no text is written as JSON."""
    content = message.get("content")
    if content is None:
        return
    if isinstance(content, str):
        yield content
    elif isinstance(content, Sequence) and all(map(_is_part, content)):
        for part in content:
            yield part["text"] if part["type"] == "text" else None
    elif ROLES[message["role"]] == "ipython":
        yield _json(content)
    else:
        raise UserError(f"a {message['role']} message holds parts that the format of the releases has no place for: texts and images only.")


def _is_part(part: Any) -> bool:
    return isinstance(part, Mapping) and (part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str)))


def _json(value: Any, *, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"a tool, a call or a result cannot be written as JSON ({error}): give dictionaries, lists and texts.") from error


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError("a tool call has no function with a name: give {'function': {'name': ..., 'arguments': {...}}}.")
    arguments = function.get("arguments", function.get("parameters")) or {}
    if isinstance(arguments, str):  # some programs hand on the model's own words
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise UserError(f"the arguments of the call to {function['name']} are no JSON ({error}): give a dictionary.") from error
    return _json({"type": "function", "name": function["name"], "parameters": arguments})
