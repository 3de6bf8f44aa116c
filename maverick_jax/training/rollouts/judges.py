"""Who answers prompts so that one sees how hard they are: a model here, or one behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from maverick_jax.errors import UserError, first_line
from maverick_jax.inference.engine import Engine
from maverick_jax.prompt import load_picture
from maverick_jax.training.data.examples import Reading
from maverick_jax.training.rollouts.prompts import Prompt
from maverick_jax.training.rollouts.sampling import draw

ATTEMPTS, PAUSE = 4, 1.0  # of a request; seconds before the second, twice as many before each further one


class Judge(Protocol):
    def answers(self, prompts: Sequence[Prompt], count: int, max_new_tokens: int, seed: int) -> list[list[str]]:
        """For each prompt `count` texts."""
        ...


@dataclasses.dataclass(frozen=True)
class Here:
    """A model of ours."""

    engine: Engine
    reading: Reading

    def answers(self, prompts: Sequence[Prompt], count: int, max_new_tokens: int, seed: int) -> list[list[str]]:
        groups = draw(self.engine, prompts, self.reading, count=count, max_new_tokens=max_new_tokens, seed=seed)
        return [[answer.text for answer in group] for group in groups]


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A model behind `URL/chat/completions`; the key is in OPENAI_API_KEY, if it takes one.

    Attributes:
      url: such as http://localhost:8000/v1.
      model: its name there.
      at_once: requests on their way.
    """

    url: str
    model: str
    at_once: int = 16

    def answers(self, prompts: Sequence[Prompt], count: int, max_new_tokens: int, seed: int) -> list[list[str]]:
        asked = [self._body(prompt, max_new_tokens, seed + number) for prompt in prompts for number in range(count)]
        with concurrent.futures.ThreadPoolExecutor(self.at_once) as threads:
            texts = [*threads.map(self._ask, asked)]
        return [texts[at : at + count] for at in range(0, len(texts), count)]

    def _body(self, prompt: Prompt, max_new_tokens: int, seed: int) -> bytes:
        messages = prompt.line["messages"]
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        body = {"model": self.model, "messages": [_as_openai(message) for message in messages], "max_tokens": max_new_tokens, "seed": seed}
        if prompt.line.get("tools"):
            body["tools"] = prompt.line["tools"]
        return json.dumps({**body, "temperature": 1.0}).encode()

    def _ask(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        said = ""
        for attempt in range(ATTEMPTS):
            try:
                with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=600) as reply:  # noqa: S310: the user's own
                    return json.load(reply)["choices"][0]["message"]["content"] or ""
            except urllib.error.HTTPError as error:
                said = f"{error.reason} {error.read(300).decode(errors='replace')}".strip()
                if error.code not in (408, 429) and error.code < 500:
                    raise UserError(f"{address} refuses the request ({error.code} {said}).") from error
            except (OSError, ValueError, LookupError, TypeError) as error:
                said = f"{type(error).__name__}: {first_line(error)}"
            if attempt + 1 < ATTEMPTS:
                time.sleep(PAUSE * 2**attempt)
        raise UserError(f"{address} did not answer, {ATTEMPTS} times ({said}): the scores so far are kept, run the same command again.")


def _as_openai(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": [_part(part) if part.get("type") == "image" else part for part in content]}


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    picture = part["image"]
    if isinstance(picture, str) and "://" in picture:
        return {"type": "image_url", "image_url": {"url": picture}}
    png = io.BytesIO()
    load_picture(str(picture) if isinstance(picture, Path) else picture).save(png, "PNG")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"}}
