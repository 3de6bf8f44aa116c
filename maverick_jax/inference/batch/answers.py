"""Answers on their way from tokens to text, and the bodies in which OpenAI's clients find them.

Source: OpenAI's API reference, the objects `chat.completion` and `text_completion`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from maverick_jax.inference.batch.asked import Asked
from maverick_jax.inference.batch.jobs import CHAT
from maverick_jax.inference.handle import Handle
from maverick_jax.inference.request import Finish
from maverick_jax.inference.stop import StopStrings
from maverick_jax.prompt import StreamDecoder, Tokenizer

LEAST_LOGPROB = -9999.0  # OpenAI's for what has none: JSON knows no infinity


class Answer:
    """One answer, as far as it has come.

    Attributes:
      text: up to a stop text.
      finish_reason: "stop" or "length"; None until it has ended.
      places: of each token that was read, where in the text it begins.
    """

    def __init__(self, handle: Handle, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self.handle = handle
        self.text = ""
        self.finish_reason: str | None = None
        self.places: list[int] = []
        self._length = 0
        self._tokenizer, self._decoder, self._stop = tokenizer, StreamDecoder(tokenizer), StopStrings(stop)

    def read(self) -> bool:
        """Take what the engine has; whether that was all. Where a stop text ends it, the engine goes no further.

        Raises:
          UserError: the request failed.
        """
        least = self.handle.request.sampling.min_tokens  # no stop text counts before, as no stop token is drawn
        for token in self.handle.tokens[len(self.places) :]:
            self.places.append(self._length)
            text = self._decoder.push(token)
            self._length += len(text)
            self.text += text if len(self.places) <= least else self._stop.push(text)
            if self._stop.met:
                self.handle.cancel()
                self.finish_reason = "stop"
                return True
        if self.handle.finish is None:
            return False
        self.handle.check()
        self.text += self._stop.push(self._decoder.flush()) + self._stop.flush()
        self.finish_reason = "length" if self.handle.finish is Finish.LENGTH and not self._stop.met else "stop"
        return True

    def chat_logprobs(self) -> dict[str, Any] | None:
        """Of a chat's choice."""
        if self.handle.request.sampling.logprobs is None:
            return None
        return {
            "content": [
                self._spelled(token) | {"logprob": own, "top_logprobs": [self._spelled(id) | {"logprob": value} for id, value in top]}
                for token, own, top, _ in self._kept()
            ],
            "refusal": None,
        }

    def completion_logprobs(self) -> dict[str, Any] | None:
        """Of a completion's choice; among the likeliest stands the token itself, as one more if need be."""
        if self.handle.request.sampling.logprobs is None:
            return None
        kept = self._kept()
        return {
            "tokens": [self._name(token) for token, *_ in kept],
            "token_logprobs": [own for _, own, *_ in kept],
            "top_logprobs": [self._by_name([*top, (token, own)]) for token, own, top, _ in kept],
            "text_offset": [place for *_, place in kept],
        }

    def _kept(self) -> list[tuple[int, float, list[tuple[int, float]], int]]:
        """Tokens that begin within the text, with their logarithms, those of the likeliest and their places."""
        found = zip(self.handle.tokens, self.handle.logprobs, self.places, strict=False)
        return [
            (token, max(own, LEAST_LOGPROB), [(id, max(value, LEAST_LOGPROB)) for id, value in top.items()], place)
            for token, (own, top), place in found
            if place < len(self.text) or not self._stop.met
        ]

    def _by_name(self, likely: list[tuple[int, float]]) -> dict[str, float]:
        """The likeliest first. Tokens may be spelled alike: then the first one stays."""
        names: dict[str, float] = {}
        for id, value in likely:
            names.setdefault(self._name(id), value)
        return names

    def _spelled(self, token: int) -> dict[str, Any]:
        return {"token": self._name(token), "bytes": list(self._tokenizer.spelling(token))}

    def _name(self, token: int) -> str:
        return self._tokenizer.spelling(token).decode("utf-8", "backslashreplace")


def body_of(asked: Asked, answers: Sequence[Answer], model: str) -> dict[str, Any]:
    """What the client gets when all answers have ended.

    Args:
      answers: one to each request, in order.
      model: its name.
    """
    job = asked.job
    if job.url == CHAT:
        kind, prefix, choices = "chat.completion", "chatcmpl", [_chat_choice(answer) for answer in answers]
    else:
        kind, prefix = "text_completion", "cmpl"
        choices = [_completion_choice(answer, echo) for answer, echo in zip(answers, asked.echoes, strict=True)]
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": index} | choice for index, choice in enumerate(choices)],
        "usage": _usage([answers[i : i + job.answers] for i in range(0, len(answers), job.answers)]),
    }


def _chat_choice(answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    return {"message": message, "logprobs": answer.chat_logprobs(), "finish_reason": answer.finish_reason}


def _completion_choice(answer: Answer, echo: str) -> dict[str, Any]:
    return {"text": echo + answer.text, "logprobs": answer.completion_logprobs(), "finish_reason": answer.finish_reason}


def _usage(groups: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """A prompt counts once, whatever the number of its answers, and is cached as far as the answer that read most of it found it."""
    prompt = sum(group[0].handle.prompt_tokens for group in groups)
    cached = sum(min(answer.handle.cached_tokens for answer in group) for group in groups)
    new = sum(len(answer.places) for group in groups for answer in group)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
