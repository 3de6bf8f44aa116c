"""What a job comes to: its answers on their way, and what they cost."""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import Any

from maverick_jax.prompt import Tokenizer
from maverick_jax.serving.answer import Answer
from maverick_jax.serving.job import Job
from maverick_jax.serving.prepare import Prepared


@dataclasses.dataclass(kw_only=True, eq=False)
class Reply:
    """Answers to one job.

    Attributes:
      prepared: the job and its requests.
      answers: one to each request, in order, those that were submitted.
      model: its name, as clients are told.
      tokenizer: the model's.
      key, created: what the reply is called, and when it was asked for, in seconds since 1970.
    """

    prepared: Prepared
    answers: list[Answer]
    model: str
    tokenizer: Tokenizer
    key: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def job(self) -> Job:
        return self.prepared.job

    @property
    def prompt_tokens(self) -> int:
        """A prompt counts once, whatever the number of its answers."""
        return sum(group[0].handle.prompt_tokens for group in self._groups())

    @property
    def cached_tokens(self) -> int:
        """Of the prompts: a prompt is cached as far as the answer that read most of it found it."""
        return sum(min(answer.handle.cached_tokens for answer in group) for group in self._groups())

    @property
    def usage(self) -> dict[str, Any]:
        """As OpenAI's clients find it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    @property
    def new_tokens(self) -> int:
        return sum(answer.new_tokens for answer in self.answers)

    def _groups(self) -> list[list[Answer]]:
        return [self.answers[i : i + self.job.answers] for i in range(0, len(self.answers), self.job.answers)]

    def cancel(self) -> None:
        """Nobody wants it any more."""
        for answer in self.answers:
            answer.handle.cancel()
