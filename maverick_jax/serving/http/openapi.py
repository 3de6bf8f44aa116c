"""What the server offers, as an OpenAPI description: for people, for generators of clients, and for those who try it at random.

Fields that have no effect are not told of.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from maverick_jax.serving.dialects import chat, completions, messages, responses

Schema = dict[str, Any]
TEXT, NUMBER, WHOLE, FLAG = ({"type": kind} for kind in ("string", "number", "integer", "boolean"))


def _listed(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _object(properties: dict[str, Schema], *required: str) -> Schema:
    """What is not required may be null, which is the same as not there."""
    nullable = {name: schema if name in required else _either(schema, {"type": "null"}) for name, schema in properties.items()}
    return {"type": "object", "properties": nullable, **({"required": list(required)} if required else {})}


def _typed(kind: str, properties: dict[str, Schema] | None = None, *required: str) -> Schema:
    """An object that says what it is, with what it then has: all of that, unless some is named."""
    return _object({"type": {"const": kind}, **(properties or {})}, "type", *(required or properties or ()))


def _either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _between(least: float, most: float | None = None, kind: Schema = NUMBER) -> Schema:
    return kind | {"minimum": least} | ({} if most is None else {"maximum": most})


SAID = TEXT | {"minLength": 1}
IDS = _listed(_between(0, None, WHOLE))
ANY: Schema = {}
ANY_OBJECT: Schema = {"type": "object"}
MODE = {"enum": ["none", "auto", "required"]}
LIMIT = _between(1, None, WHOLE)
SAMPLING = {
    "temperature": _between(0),
    "top_p": _between(0, 1),
    "top_k": LIMIT,
    "min_p": _between(0, 1),
    "seed": WHOLE,
    "repetition_penalty": _between(0.01, 100),
    "presence_penalty": _between(-2, 2),
    "frequency_penalty": _between(-2, 2),
    "logit_bias": {"type": "object", "additionalProperties": _between(-100, 100)},
    "min_tokens": _between(0, None, WHOLE),
}
SHARED = {
    "model": TEXT,
    **SAMPLING,
    "stop": _either(SAID, _listed(SAID)),
    "stop_token_ids": IDS,
    "ignore_eos": FLAG,
    "n": _between(1, 128, WHOLE),
    "response_format": _either(
        _typed("text"), _typed("json_object"), _typed("json_schema", {"json_schema": _object({"schema": ANY_OBJECT}, "schema")})
    ),
    "structured_outputs": _object(
        {"json": ANY_OBJECT, "json_object": {"const": True}, "regex": SAID, "choice": _listed(SAID, minItems=1), "grammar": SAID}
    )
    | {"additionalProperties": False, "minProperties": 1, "maxProperties": 1},
    "stream": FLAG,
    "stream_options": _object({"include_usage": FLAG}),
    "return_token_ids": FLAG,
    "prompt_logprobs": _between(0, 20, WHOLE),
    "routed_experts_prompt_start": WHOLE,
}
FUNCTION = {"name": SAID | {"maxLength": 256, "pattern": "^[ -~]+$"}, "description": TEXT, "parameters": ANY_OBJECT}
SAYING = _object({"type": {"const": "text"}, "text": TEXT}, "type", "text")
PICTURE = _typed("image_url", {"image_url": _object({"url": SAID}, "url")})
CALL = _object({"id": ANY, "type": ANY, "function": _object({"name": TEXT, "arguments": _either(TEXT, ANY_OBJECT)}, "name")}, "function")
MESSAGE = _object(
    {"role": TEXT, "content": _either(TEXT, _listed(_either(SAYING, PICTURE))), "tool_calls": _listed(CALL), "tool_call_id": ANY}, "role"
)
MESSAGES = _listed(MESSAGE, minItems=1)
ITEM = _either(
    _object({"role": TEXT, "content": _either(TEXT, _listed(ANY_OBJECT))}, "role", "content"),
    _typed("function_call", {"call_id": ANY, "name": TEXT, "arguments": TEXT}),
    _typed("function_call_output", {"call_id": ANY, "output": TEXT}),
)
BLOCK = _either(
    SAYING,
    _typed("image", {"source": _typed("base64", {"media_type": TEXT, "data": TEXT})}),
    _typed("tool_use", {"id": ANY, "name": TEXT, "input": ANY_OBJECT}),
    _typed("tool_result", {"tool_use_id": ANY, "content": _either(TEXT, _listed(SAYING))}, "tool_use_id"),
)
TURNS = _listed(_object({"role": {"enum": ["user", "assistant"]}, "content": _either(TEXT, _listed(BLOCK))}, "role", "content"), minItems=1)
CHAT = {
    "messages": MESSAGES,
    **SHARED,
    "tools": _listed(_typed("function", {"function": _object(FUNCTION, "name")})),
    "tool_choice": _either(MODE, _typed("function", {"function": _object({"name": SAID}, "name")})),
    "parallel_tool_calls": FLAG,
    "max_tokens": LIMIT,
    "max_completion_tokens": LIMIT,
    "logprobs": FLAG,
    "top_logprobs": _between(0, 20, WHOLE),
    "continue_final_message": FLAG,
    "add_generation_prompt": FLAG,
    "chat_template_kwargs": ANY_OBJECT,
}
FORM = _typed("json_schema", {"schema": ANY_OBJECT})
SYSTEM = _either(TEXT, _listed(SAYING))
ANTHROPIC_TOOLS = _listed(_object({"name": FUNCTION["name"], "description": TEXT, "input_schema": ANY_OBJECT}, "name"))
BODIES = {
    chat.URL: _object(CHAT, "messages"),
    responses.URL: _object(
        {
            "input": _either(TEXT, _listed(ITEM, minItems=1)),
            "instructions": TEXT,
            "model": TEXT,
            **SAMPLING,
            "tools": _listed(_typed("function", FUNCTION, "name")),
            "tool_choice": _either(MODE, _typed("function", {"name": SAID})),
            "parallel_tool_calls": FLAG,
            "max_output_tokens": LIMIT,
            "text": _object({"format": _either(_typed("text"), _typed("json_object"), _typed("json_schema", {"schema": ANY_OBJECT}))}),
            "stream": FLAG,
        },
        "input",
    ),
    completions.URL: _object(
        {
            "prompt": _either(TEXT, _listed(TEXT), IDS, _listed(IDS)),
            **SHARED,
            "max_tokens": LIMIT,
            "echo": FLAG,
            "logprobs": _between(0, 20, WHOLE),
        },
        "prompt",
    ),
    messages.URL: _object(
        {
            "messages": TURNS,
            "max_tokens": LIMIT,
            "model": TEXT,
            "system": SYSTEM,
            "tools": ANTHROPIC_TOOLS,
            "tool_choice": _either(_typed("auto"), _typed("any"), _typed("none"), _typed("tool", {"name": SAID})),
            "temperature": SAMPLING["temperature"],
            "top_p": SAMPLING["top_p"],
            "top_k": LIMIT,
            "stop_sequences": _listed(SAID),
            "output_config": _object({"format": FORM}),
            "output_format": FORM,
            "stream": FLAG,
        },
        "messages",
        "max_tokens",
    ),
    f"{messages.URL}/count_tokens": _object({"messages": TURNS, "system": SYSTEM, "tools": ANTHROPIC_TOOLS}, "messages"),
    "/tokenize": _object({"prompt": TEXT, "messages": MESSAGES, "add_special_tokens": FLAG, "return_token_strs": FLAG})
    | {"anyOf": [{"required": ["prompt"]}, {"required": ["messages"]}]},
    "/detokenize": _object({"tokens": IDS}, "tokens"),
}
ASKED = {
    "/v1/models": "The model's names and its longest prompt with an answer.",
    "/tokenizer_info": "Tokens that begin and end a text, and the chat template.",
    "/version": "The program's version.",
}
OPENAI_ERROR = _object({"error": _object({"message": TEXT, "type": TEXT}, "message", "type", "param", "code")}, "error")
ANTHROPIC_ERROR = _object(
    {"type": {"const": "error"}, "error": _object({"type": TEXT, "message": TEXT}, "type", "message")}, "type", "error"
)
ERRORS = (400, 401, 404, 405, 408, 413, 429, 500, 503)


def description() -> dict[str, Any]:
    """OpenAPI 3.1."""
    paths = {path: {"post": _operation(path, body)} for path, body in BODIES.items()}
    paths |= {path: {"get": {"summary": text, "responses": _responses(path)}} for path, text in ASKED.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "maverick-jax", "version": importlib.metadata.version("maverick-jax")},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }


def _operation(path: str, body: Schema) -> dict[str, Any]:
    return {
        "summary": f"See {path} in the guide to serving.",
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": _responses(path, streams="stream" in body["properties"]),
    }


def _responses(path: str, *, streams: bool = False) -> dict[str, Any]:
    error = ANTHROPIC_ERROR if path.startswith(messages.URL) else OPENAI_ERROR
    content: dict[str, Any] = {"application/json": {"schema": ANY_OBJECT}}
    if streams:
        content["text/event-stream"] = {}
    failed = {str(status): {"description": "What went wrong.", "content": {"application/json": {"schema": error}}} for status in ERRORS}
    return {"200": {"description": "The answer.", "content": content}, **failed}
