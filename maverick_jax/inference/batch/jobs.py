"""What the body of one request asks for, as OpenAI's `/v1/chat/completions` and `/v1/completions` take it.

Fields that only steer OpenAI's service are taken and ignored; one that nobody knows is refused, as OpenAI does: a misspelt
`max_tokens` would cost a night. A field that is null is one that is not there.
"""

from __future__ import annotations

import base64
import dataclasses
import difflib
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import MAX_NEW_TOKENS, Range, listed, shown, stop_strings, whole, whole_numbers
from maverick_jax.inference.grammar import Grammar
from maverick_jax.json_file import parse_json

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAMPLING = frozenset(
    "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty logit_bias seed min_tokens".split()
)
SHARED = SAMPLING | set("model max_tokens stop stop_token_ids ignore_eos n logprobs response_format structured_outputs stream".split())
IGNORED = frozenset(
    "user metadata store service_tier prompt_cache_key prompt_cache_retention safety_identifier reasoning_effort verbosity stream_options "
    "parallel_tool_calls".split()
)
FIELDS = {
    CHAT: SHARED
    | set("messages max_completion_tokens top_logprobs tools tool_choice chat_template_kwargs continue_final_message".split())
    | {"add_generation_prompt"},
    COMPLETIONS: SHARED | {"prompt", "echo"},
}
ANSWERS = Range(whole, 1, 128, "a whole number between 1 and 128")
LONGEST_ID = 10  # digits of a token's
SEEDS = Range(whole, -(2**63), 2**63 - 1, "a whole number of 64 bits")
SHORT = 16  # tokens of a completion that names no limit, as OpenAI's: a base model never ends by itself
LOGPROBS = Range(whole, 0, 20, "a whole number between 0 and 20")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One request.

    Attributes:
      custom_id: the requester's name for it.
      url: `CHAT` or `COMPLETIONS`.
      messages: of a chat, as `render` takes them.
      prompts: of completions, texts or token ids.
      tools: schemas, as `render` takes them.
      render: other settings of `render`.
      sampling: settings of `Sampling` by name, as they were given; their values are for it to check.
      max_new_tokens: None for as many as there is room for.
      stop: texts that end an answer.
      stop_ids: tokens that do so besides the model's own.
      ignore_eos: whether the model's own do not.
      answers: to each prompt.
      echo: whether the prompt is part of a completion's text.
      grammar: the form of the answer.
    """

    custom_id: str
    url: str
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    prompts: list[str | list[int]] = dataclasses.field(default_factory=list)
    tools: list[Any] | None = None
    render: dict[str, Any] = dataclasses.field(default_factory=dict)
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    answers: int = 1
    echo: bool = False
    grammar: Grammar | None = None

    @classmethod
    def of(cls, custom_id: str, url: str, body: dict[str, Any]) -> Job:
        """The request that a body asks for.

        Raises:
          UserError: a field that is not known, missing, or of another kind.
        """
        given = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
        _check_names(given, url)
        if _flag(given, "stream"):
            raise UserError("stream is true: the answers of a batch come whole.")
        return cls(
            custom_id=custom_id,
            url=url,
            sampling=_sampling(given, url),
            max_new_tokens=_longest(given, url),
            stop=stop_strings(given.get("stop", ())),
            stop_ids=tuple(_ids(given.get("stop_token_ids", []), "stop_token_ids")),
            ignore_eos=_flag(given, "ignore_eos"),
            answers=ANSWERS.check("n", given.get("n", 1)),
            grammar=_grammar(given),
            **(_chat(given) if url == CHAT else {"prompts": _prompts(given), "echo": _echo(given)}),
        )


def _check_names(given: dict[str, Any], url: str) -> None:
    for name in given:
        if name not in FIELDS[url]:
            near = difflib.get_close_matches(name, FIELDS[url], n=1)
            raise UserError(f"{name!a} is no field of {url}: {f'did you mean {near[0]}?' if near else 'leave it out.'}")


def _sampling(given: dict[str, Any], url: str) -> dict[str, Any]:
    settings = {"temperature": 1.0} | {name: given[name] for name in SAMPLING & given.keys()}  # OpenAI's default
    if isinstance(biases := settings.get("logit_bias"), dict):
        if wrong := [id for id in biases if not id.isdecimal() or len(id) > LONGEST_ID]:
            raise UserError(f"logit_bias has {shown(wrong[0])}: expected token ids.")
        settings["logit_bias"] = {int(id): bias for id, bias in biases.items()}
    if "seed" in settings:
        settings["seed"] = SEEDS.check("seed", settings["seed"]) % 2**32
    if whole(settings.get("top_p")) == 0:  # OpenAI's lowest: the most likely token alone
        del settings["top_p"]
        settings["top_k"] = 1
    if url == COMPLETIONS and "logprobs" in given:
        settings["logprobs"] = LOGPROBS.check("logprobs", given["logprobs"])
    if url == CHAT and _flag(given, "logprobs"):
        settings["logprobs"] = LOGPROBS.check("top_logprobs", given.get("top_logprobs", 0))
    elif "top_logprobs" in given:
        raise UserError("top_logprobs is given without logprobs: set logprobs to true.")
    return settings


def _longest(given: dict[str, Any], url: str) -> int | None:
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in given]
    if len(names) == 2:
        raise UserError("both max_tokens and max_completion_tokens are given: give one of them.")
    if not names:
        return SHORT if url == COMPLETIONS else None
    return MAX_NEW_TOKENS.check(names[0], given[names[0]])


def _grammar(given: dict[str, Any]) -> Grammar | None:
    """Of `response_format`, or of vLLM's `structured_outputs`."""
    wanted, outputs = given.get("response_format"), given.get("structured_outputs")
    if wanted is not None and outputs is not None:
        raise UserError("both response_format and structured_outputs are given: give one of them.")
    if outputs is not None:
        names = {"json": "json_schema", "json_object": "json_object", "regex": "regex", "choice": "choice", "grammar": "lark"}
        if not isinstance(outputs, dict) or not outputs.keys() <= names.keys():
            raise UserError(f"structured_outputs is {shown(outputs)}: expected one of {', '.join(names)}.")
        return Grammar(**{names[name]: value for name, value in outputs.items() if value is not None})
    match wanted:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return Grammar(json_object=True)
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return Grammar(json_schema=schema)
    raise UserError(f"response_format is {shown(wanted)}: expected type text, json_object, or json_schema with a json_schema of a schema.")


def _chat(given: dict[str, Any]) -> dict[str, Any]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages is {shown(messages)}: expected a list of at least one message.")
    choice = given.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise UserError(f"tool_choice is {shown(choice)}: expected auto or none; to force a form give response_format.")
    options = {name: _flag(given, name) for name in ("continue_final_message", "add_generation_prompt") if name in given}
    if (kwargs := given.get("chat_template_kwargs", {})) != {}:
        raise UserError(f"chat_template_kwargs is {shown(kwargs)}: chat templates take no settings of their own here.")
    tools = None if choice == "none" else given.get("tools")
    return {"messages": [_message(message) for message in messages], "tools": tools, "render": options}


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"messages holds {shown(message)}: expected objects with a role and a content.")
    message = message | {"role": "system"} if message["role"] == "developer" else message
    if isinstance(parts := message.get("content"), list):
        message = message | {"content": [_part(part) for part in parts]}
    if isinstance(calls := message.get("tool_calls"), list):
        message = message | {"tool_calls": [_call(call) for call in calls]}
    return message


def _call(call: Any) -> Any:
    """A tool's arguments as an object, which OpenAI writes as JSON in a text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(text := function.get("arguments"), str):
        return call
    try:
        arguments = parse_json(text.encode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"the arguments of a tool call are no JSON ({error}): send them as the model wrote them.") from error
    if not isinstance(arguments, dict):
        raise UserError(f"the arguments of a tool call are {shown(arguments)}: expected a JSON object.")
    return call | {"function": function | {"arguments": arguments}}


def _part(part: Any) -> Any:
    """Pictures as bytes; other parts are for `render` to understand."""
    if not isinstance(part, dict) or part.get("type") not in ("image", "image_url"):
        return part
    place = part.get(part["type"])
    url = place.get("url") if isinstance(place, dict) else place
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    try:
        if head.startswith("data:image/") and head.endswith(";base64") and comma:
            return {"type": "image", "image": base64.b64decode(data, validate=True)}
    except ValueError as error:
        raise UserError(f"a picture's address is no base64 ({error}): encode it again.") from error
    raise UserError(f"a picture's address is {shown(url)}: nothing is fetched for a batch; give data:image/png;base64,… with its bytes.")


def _prompts(given: dict[str, Any]) -> list[str | list[int]]:
    prompt = given.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    items = listed(prompt) or []
    if items and all(whole(item) is not None for item in items):
        return [items]
    if not items or not all(isinstance(item, str | list) and item for item in items):
        raise UserError(f"prompt is {shown(prompt)}: expected a text, token ids, or a list of either.")
    return [item if isinstance(item, str) else _ids(item, "prompt") for item in items]


def _echo(given: dict[str, Any]) -> bool:
    echo = _flag(given, "echo")
    if echo and "logprobs" in given:
        raise UserError("both echo and logprobs are given: a prompt has no log-probabilities here; leave out one of them.")
    return echo


def _ids(values: Any, name: str) -> list[int]:
    if (items := listed(values)) is None:
        raise UserError(f"{name} is {shown(values)}: expected a list of token ids.")
    return whole_numbers(items, name)


def _flag(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"{name} is {shown(value)}: it must be true or false.")
    return value
