"""Settings that the dialects of OpenAI's clients share, and those of vLLM that are sent beside them.

Fields that only steer OpenAI's service are taken and ignored.
"""

from __future__ import annotations

from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import Range, shown, stop_strings, whole
from maverick_jax.inference.grammar import Grammar
from maverick_jax.inference.request import PROMPT_LOGPROBS
from maverick_jax.serving.fields import Fields
from maverick_jax.serving.tools.choice import Tools, function, tools

SAMPLING = "top_p top_k min_p repetition_penalty presence_penalty frequency_penalty min_tokens".split()
IGNORED = frozenset(
    "user metadata store service_tier prompt_cache_key prompt_cache_retention safety_identifier reasoning_effort verbosity".split()
)
ANSWERS = Range(whole, 1, 128, "a whole number between 1 and 128")
SEEDS = Range(whole, -(2**63), 2**63 - 1, "a whole number of 64 bits")
POSITIONS = Range(whole, 0, 2**31 - 1, "a token of the prompt, a whole number from 0")
LONGEST_ID = 10  # digits of a token's
STRUCTURED = {"json": "json_schema", "json_object": "json_object", "regex": "regex", "choice": "choice", "grammar": "lark"}


def shared(fields: Fields) -> dict[str, Any]:
    """Of a `Job`, by name: all but the prompt, the longest answer and log-probabilities.

    Raises:
      UserError: a value of another kind.
    """
    fields.ignore(IGNORED)
    options = Fields(fields.get("stream_options", {}), "stream_options")
    return dict(
        model=fields.text("model") or None,
        sampling=sampling(fields),
        stop=stop_strings(fields.get("stop", ())),
        stop_ids=tuple(fields.ids("stop_token_ids")),
        ignore_eos=fields.flag("ignore_eos"),
        answers=fields.number("n", ANSWERS, 1),
        grammar=grammar(fields),
        prompt_logprobs=fields.number("prompt_logprobs", PROMPT_LOGPROBS),
        stream=fields.flag("stream"),
        stream_usage=options.flag("include_usage"),
        return_token_ids=fields.flag("return_token_ids"),
        routed_experts_prompt_start=fields.number("routed_experts_prompt_start", POSITIONS),
    )


def sampling(fields: Fields) -> dict[str, Any]:
    settings = {"temperature": fields.get("temperature", 1.0)}  # OpenAI's default
    settings |= {name: fields.get(name) for name in SAMPLING if fields.has(name)}
    if isinstance(biases := fields.get("logit_bias"), dict):
        if wrong := [id for id in biases if not id.isdecimal() or len(id) > LONGEST_ID]:
            raise UserError(f"logit_bias has {shown(wrong[0])}: expected token ids.")
        settings["logit_bias"] = {int(id): bias for id, bias in biases.items()}
    elif biases is not None:
        settings["logit_bias"] = biases
    if (seed := fields.number("seed", SEEDS)) is not None:
        settings["seed"] = seed % 2**32
    if whole(settings.get("top_p")) == 0:  # OpenAI's lowest: the most likely token alone
        del settings["top_p"]
        settings["top_k"] = 1
    return settings


def grammar(fields: Fields) -> Grammar | None:
    """Of `response_format`, or of vLLM's `structured_outputs`."""
    wanted, outputs = fields.get("response_format"), fields.get("structured_outputs")
    if wanted is not None and outputs is not None:
        raise UserError("both response_format and structured_outputs are given: give one of them.")
    if outputs is not None:
        if not isinstance(outputs, dict) or not outputs.keys() <= STRUCTURED.keys():
            raise UserError(f"structured_outputs is {shown(outputs)}: expected one of {', '.join(STRUCTURED)}.")
        return Grammar(**{STRUCTURED[name]: value for name, value in outputs.items() if value is not None})
    return form(wanted, "response_format")


def form(wanted: Any, name: str) -> Grammar | None:
    """Of what OpenAI calls a response's format."""
    match wanted:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return Grammar(json_object=True)
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return Grammar(json_schema=schema)
    raise UserError(f"{name} is {shown(wanted)}: expected type text, json_object, or json_schema with a json_schema of a schema.")


def chosen_tools(fields: Fields, inner: str | None = None) -> Tools:
    """Of `tools` and `tool_choice`.

    Args:
      inner: the field of a tool, or of a choice, that says more about it; None where it does so itself.
    """

    def inside(value: Any, name: str | None = inner) -> Any:
        return value.get(name) if inner else value

    functions = []
    for tool in fields.objects("tools"):
        if _is_function(tool):
            functions.append(function(inside(tool), "tools"))
        else:
            fields.note(f"tools holds {shown(tool)}, which is no function: the model is not told of it.")
    choice, parallel = fields.get("tool_choice", "auto" if functions else "none"), fields.flag("parallel_tool_calls", True)
    match choice:
        case "none" | "auto" | "required":
            return tools(functions, choice, parallel=parallel)
        case {"type": "function"}:
            return tools(functions, "required", [_name(inside(choice))], parallel=False)
        case {"type": "allowed_tools"}:
            match inside(choice, "allowed_tools"):
                case {"mode": "auto" | "required" as mode, "tools": list() as allowed}:
                    return tools(functions, mode, [_name(inside(tool)) for tool in allowed if _is_function(tool)], parallel=parallel)
    raise UserError(f"tool_choice is {shown(choice)}: expected none, auto, required, or a function by its name.")


def _is_function(tool: Any) -> bool:
    return isinstance(tool, dict) and tool.get("type", "function") == "function"


def _name(values: Any) -> str:
    match values:
        case {"name": str() as name}:
            return name
    raise UserError(f"tool_choice names {shown(values)}: expected a function by its name.")
