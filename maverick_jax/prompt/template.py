"""A checkpoint's own chat template: found, compiled, and rendered into text that knows its authors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from maverick_jax import stand_ins
from maverick_jax.errors import UserError
from maverick_jax.json_file import read_json
from maverick_jax.prompt.budget import TooExpensive, budget_for, check_output
from maverick_jax.prompt.provenance import Text, joined, written
from maverick_jax.prompt.sandbox import ChatEnvironment

MAX_SOURCE = 100_000  # characters of a template; the longest that are published have some 30,000
MAX_MESSAGE = 300  # characters of what a template says
ROLES = frozenset("assistant developer function ipython system tool user".split())  # names that a template may build tokens from
NAMED_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", "pad_token": "<|finetune_right_pad|>"}  # of the releases
REASONING = ("reasoning_content", "thinking", "reasoning")  # names for what a model thought, the standard one first


class ChatTemplate:
    """The chat templates of one checkpoint.

    Args:
      sources: the text of each named template: `default`, `tool_use` (taken where tools are given), others.
      tokens: named tokens such as `eos_token`, which the templates see.
      name: what the templates belong to, for messages.

    Attributes:
      sources, name: as given.

    Raises:
      UserError: a template that cannot be compiled.
    """

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str], name: str):
        self.name, self.sources = name, dict(sources)
        self.tokens = {key: written(token) for key, token in tokens.items()}
        self._names = sorted(sources)
        self._compiled = {key: self._compile(source) for key, source in sources.items() if key in ("default", "tool_use")}

    def __repr__(self) -> str:
        return f"ChatTemplate({self.name!r}: {', '.join(self._names)})"

    def _compile(self, source: str) -> jinja2.Template:
        if len(source) > MAX_SOURCE:
            raise UserError(f"the chat template of {self.name} has {len(source):,} characters: at most {MAX_SOURCE:,} are allowed.")
        try:
            return ChatEnvironment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template of {self.name} has an error in line {error.lineno}: {_said(error)}.") from error
        except Exception as error:  # nested too deeply, or made so that Jinja or Python stumbles
            raise UserError(f"the chat template of {self.name} cannot be used ({_said(error)}): fetch it again.") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: list[Any] | None, add_generation_prompt: bool, continued: str | None
    ) -> Text:
        """The whole prompt as text.

        Args:
          continued: the field of the last message that the model is to go on with; the text ends where it does.

        Raises:
          UserError: the template refuses the conversation, or fails.
        """
        template = self._compiled.get("tool_use") if tools is not None else None
        template = template or self._compiled.get("default")
        if template is None:
            raise UserError(f"the chat templates of {self.name} are {', '.join(self._names)}, and none is 'default': name one so.")
        mark, last = None, ""
        try:
            given = [_with_reasoning(plain(_without_nulls(message))) for message in messages]
            variables = self.tokens | {"messages": given, "tools": plain(tools), "documents": None}
            with budget_for(given, variables["tools"]):
                if continued:
                    mark, last = _mark(given, continued)
                text = _collected(template.generate(**variables, add_generation_prompt=add_generation_prompt and not continued))
        except UserError:
            raise
        except Exception as error:  # whatever a template makes Python stumble over
            raise UserError(f"the chat template refused the conversation: {_said(error)}") from error
        return text if mark is None else _up_to(mark, last, text)


def _collected(pieces: Iterable[str]) -> Text:
    texts, length = [], 0
    for piece in pieces:
        length += len(piece)
        check_output(length)
        texts.append(piece)
    return joined(texts)


def _said(error: Exception) -> str:
    """What an exception says, in bounds; a template's own words stand for themselves."""
    name = "" if isinstance(error, (jinja2.TemplateError, TooExpensive)) else f"{type(error).__name__}: "
    message = error.message if isinstance(error, jinja2.TemplateError) else error
    return f"{name}{message}"[:MAX_MESSAGE].rstrip(". :")


def load_template(path: str | Path) -> ChatTemplate | None:
    """The chat template that a checkpoint directory brings, or None.

    Files of their own (`chat_template.jinja`, `additional_chat_templates/`) come before what a JSON file says.

    Raises:
      UserError: a file that cannot be read, or a template that cannot be compiled.
    """
    directory = Path(path)
    sources = {file.stem: _read(file, MAX_SOURCE * 4) for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        sources["default"] = _read(directory / "chat_template.jinja", MAX_SOURCE * 4)
    config = _read_object(directory / "tokenizer_config.json")
    for name, values in (("chat_template.json", None), ("tokenizer_config.json", config)):
        if not sources:
            values = _read_object(directory / name) if values is None else values
            sources = _by_name(values.get("chat_template"), directory / name)
    return ChatTemplate(sources, _named_tokens(directory, config), str(directory)) if sources else None


def _read(file: Path, limit: int) -> str:
    try:
        if file.stat().st_size > limit:
            raise UserError(f"{file} has more than {limit:,} bytes: it is no chat template; fetch it again or remove it.")
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): fetch it again or remove it.") from error
    if (instead := stand_ins.explain(text[: stand_ins.ENOUGH].encode())) is not None:
        raise UserError(f"{file} {instead}")
    return text


def _read_object(file: Path) -> dict[str, Any]:
    return read_json(file, advice="fetch it again or remove it") if file.is_file() else {}


def _by_name(found: Any, file: Path) -> dict[str, str]:
    """One template, or several as a list of names and templates or as an object."""
    if found is None:
        return {}
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = {entry.get("name"): entry.get("template") for entry in found}
    named = {"default": found} if isinstance(found, str) else found
    if isinstance(named, dict) and all(isinstance(text, str) for pair in named.items() for text in pair):
        return named
    raise UserError(f"{file} has a chat_template that is neither a text nor a list of names and templates: fetch it again.")


def _named_tokens(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its like: a name that no file mentions is the releases', one that is null is not there."""
    named = NAMED_TOKENS | config
    if "added_tokens_decoder" not in config:  # written by older versions, which left the names to a file of their own
        named |= _read_object(directory / "special_tokens_map.json")
    extra = named.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: value for key, value in contents.items() if key.endswith("_token") and isinstance(value, str)}


def plain(value: Any) -> Any:
    """`value` of plain types for a template: nothing else, such as a picture, is within its reach."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return Text(str.__str__(value))
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else list(map(plain, value))
    if isinstance(value, np.generic):
        return plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic
        return plain(dump())
    return Text(f"<{type(value).__name__}>")


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A null is a field that is not there: templates ask whether a message has `tool_calls`."""
    return {key: value for key, value in message.items() if value is not None}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its thoughts under the names that templates read, and a known role as the template's own word."""
    thought = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if thought is not None:
        message = {"thinking": thought} | message | {"reasoning_content": thought}
    return message | {"role": written(message["role"])} if message.get("role") in ROLES else message


def _mark(given: list[dict[str, Any]], field: str) -> tuple[str, str]:
    """Put a mark that nothing else holds behind the text that the model is to go on with; return both.

    The space behind it tells whether the template trims: then the text in front of it is trimmed too.
    """
    everything = repr(given)  # which writes such characters as their numbers
    mark = next(char for char in map(chr, range(0xF0000, 0xFFFFE)) if repr(char)[1:-1] not in everything) + "\U000ffffd"
    message = given[-1]
    text = message.get(field)
    if isinstance(text, (list, tuple)):
        part = next((part for part in reversed(text) if isinstance(part, dict) and isinstance(part.get("text"), str)), None)
        if part is not None:
            text = part["text"]
            part["text"] += f"{mark} "
            return mark, text
    elif isinstance(text, str):
        names = [name for name in REASONING if message.get(name) == text] if field in REASONING else [field]
        message |= dict.fromkeys(names, f"{text}{mark} ")
        return mark, text
    raise UserError(f"the last message has no text in its {field!r} that the model could continue.")


def _up_to(mark: str, last: str, text: Text) -> Text:
    if mark not in text or last.strip() not in text:
        raise UserError("the chat template leaves out the message to be continued: let the model begin a new one.")
    end = text.rindex(mark)
    return text[:end] if text[end:].startswith(f"{mark} ") else text[:end].rstrip()
