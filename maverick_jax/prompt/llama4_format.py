"""The chat format of the releases, for checkpoints without a template of their own.

Sources: Llama 4 reference, `models/llama4/chat_format.py` and `prompt_format.md`; spec section 4.3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.prompt.provenance import Text, written

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython", "ipython": "ipython"}
CONTROL = tuple(f"<|{name}|>" for name in "begin_of_text header_start header_end eom eot image".split())
TOOLS = "Here is a list of functions in JSON format that you can invoke.\n\n{functions}\n\n{manner}"
MANNER = (
    'To invoke one, answer with {"type": "function", "name": function name, "parameters": dictionary of argument name and its value} '
    "and nothing else. Do not use variables."
)


def write_dialog(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> list[Text]:
    """A conversation in pieces that are encoded apart from each other, with one `<|image|>` for every picture.

    Header and content are pieces of their own, so that a content's first line break does not join the header's.

    Raises:
      UserError: a message that the format has no place for.
    """

    def header(role: str) -> Text:
        return written(f"<|header_start|>{role}<|header_end|>\n\n")

    pieces = [written("<|begin_of_text|>")]
    for message in _with_tools(messages, tools):
        role = ROLES.get(message["role"])
        if role is None:
            raise UserError(f"role {message['role']!r} is unknown to the format of the releases: use one of {', '.join(ROLES)}.")
        pieces.append(header(role))
        pieces += [written("<|image|>") if text is None else Text(text) for text in _contents(message)]
        calls = message.get("tool_calls") or []
        if not isinstance(calls, (list, tuple)):
            raise UserError(f"tool_calls is a {type(calls).__name__}: give a list of calls.")
        pieces += [Text(_call(call)) for call in calls]
        pieces.append(written("<|eom|>" if calls or role == "ipython" else "<|eot|>"))
    if continue_final_message:
        return pieces[:-1]
    return [*pieces, header("assistant")] if add_generation_prompt else pieces


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
