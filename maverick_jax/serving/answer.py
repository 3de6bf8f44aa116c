"""An answer on its way from tokens to what clients are told of it: portions of text, calls of tools, and why it ended.

Always: the portions of an answer, put together, are the same however the tokens came.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

from maverick_jax.inference.handle import Handle
from maverick_jax.inference.request import Finish
from maverick_jax.inference.stop import StopStrings
from maverick_jax.prompt import StreamDecoder, Tokenizer
from maverick_jax.serving.tools.choice import NO_TOOLS, Tools
from maverick_jax.serving.tools.reader import CallDelta, CallReader


class Token(NamedTuple):
    """A token of an answer.

    Attributes:
      place: where in the text it begins.
      logprob, likeliest: of itself and of the likeliest ones by their ids; None and empty where nobody asked.
    """

    id: int
    place: int
    logprob: float | None
    likeliest: dict[int, float]


class Portion(NamedTuple):
    """What has come of an answer since the portion before.

    Attributes:
      parts: texts, and parts of calls, in order.
      tokens: those that certainly are of the answer.
      finish: "stop", "length" or "tool_calls" with the last one.
    """

    parts: Sequence[str | CallDelta]
    tokens: Sequence[Token]
    finish: str | None


@dataclasses.dataclass
class Call:
    """A whole one; its arguments are a JSON object, unless the answer was cut off in it."""

    id: str
    name: str
    arguments: str


@dataclasses.dataclass(slots=True)
class Timing:
    """When tokens came, in seconds of `time.perf_counter`.

    Attributes:
      asked: when the request was made.
      first, last: when its tokens were read.
      tokens: how many they were by then.
    """

    asked: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


class Answer:
    """One answer, as far as it has come.

    Args:
      stop: texts that end it.
      stop_token: whether a token that ends it is one of its tokens, though it says nothing.

    Attributes:
      new_tokens: how many were read.
      finish: as the last portion's; None until it has ended.
      tokens: those that certainly are of it.
      timing: for whoever measures.
    """

    def __init__(
        self, handle: Handle, tokenizer: Tokenizer, stop: tuple[str, ...] = (), tools: Tools = NO_TOOLS, *, stop_token: bool = False
    ):
        self.handle = handle
        self.new_tokens = 0
        self.finish: str | None = None
        self.tokens: list[Token] = []
        self.timing = Timing(time.perf_counter())
        self._parts: list[str | CallDelta] = []
        self._decoder, self._stop = StreamDecoder(tokenizer), StopStrings(stop)
        self._calls = CallReader(tools) if tools.allowed else None
        self._stop_token = stop_token
        self._length = 0  # of the text, what a stop text may cut off included
        self._certain = 0  # of the text
        self._waiting: list[Token] = []  # that begin behind what is certain

    @property
    def said(self) -> list[str | Call]:
        """Its texts and calls, in order."""
        said: list[str | Call] = []
        calls: list[Call] = []
        for part in self._parts:
            if isinstance(part, CallDelta):
                if part.name:
                    calls.append(Call(part.id, part.name, ""))
                    said.append(calls[-1])
                calls[part.call].arguments += part.arguments
            elif said and isinstance(said[-1], str):
                said[-1] += part
            else:
                said.append(part)
        return said

    @property
    def text(self) -> str:
        """What it says, without its calls."""
        return "".join(part for part in self._parts if isinstance(part, str))

    @property
    def stop_text(self) -> str | None:
        """The one that ended it."""
        return self._stop.found

    @property
    def has_news(self) -> bool:
        return self.finish is None and (self.new_tokens < len(self.handle.tokens) or self.handle.finish is not None)

    def read(self) -> Portion:
        """Take what the engine has. Where a stop text ends it, the engine goes no further.

        Raises:
          UserError: the request failed.
        """
        ended = self.handle.finish is not None  # asked first: the last token may come between both
        text = "".join(self._read(token) for token in self.handle.tokens[self.new_tokens :])
        if self._stop.met:
            self.handle.cancel()
            self.finish = "stop"
        elif ended:
            self.handle.check()
            text += self._stop.push(self._decoder.flush()) + self._stop.flush()
            self.finish = "length" if self.handle.finish is Finish.LENGTH and not self._stop.met else "stop"
            if self._stop_token and self.handle.stop_token is not None and not self._stop.met:
                self._waiting.append(Token(self.handle.stop_token, self._length, *(self.handle.stop_logprob or (None, {}))))
        parts: list[str | CallDelta] = [text] if text else []
        if self._calls is not None:
            parts = self._calls.push(text) + (self._calls.flush() if self.finish else [])
            if self.finish == "stop" and self._calls.count:
                self.finish = "tool_calls"
        self._parts += parts
        return Portion(parts, self._release(len(text)), self.finish)

    def _read(self, token: int) -> str:
        """The text that is certain once a token has come."""
        if self._stop.met:
            return ""
        own, likeliest = self.handle.logprobs[self.new_tokens] if self.handle.logprobs else (None, {})
        self._waiting.append(Token(token, self._length, own, likeliest))
        self.new_tokens += 1
        text = self._decoder.push(token)
        self._length += len(text)
        # No stop text counts before `min_tokens`, as no stop token is drawn.
        return text if self.new_tokens <= self.handle.request.sampling.min_tokens else self._stop.push(text)

    def _release(self, certain: int) -> Sequence[Token]:
        """The tokens that begin within what is certain of the text; at its end those too that have none, unless a stop text cut it."""
        self._certain += certain
        count = len(self._waiting)
        if self._stop.met or self.finish is None:
            while count and self._waiting[count - 1].place >= self._certain:
                count -= 1
        released, self._waiting = self._waiting[:count], self._waiting[count:]
        self.tokens += released
        return released
