"""What a caller holds of a request that the engine serves: its tokens as they come, and what it cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np

from maverick_jax.errors import UserError
from maverick_jax.inference.clock import seconds_compiling
from maverick_jax.inference.request import Admitted, Finish
from maverick_jax.inference.sampling import Sampled, Scores


class Handle:
    """A request on its way: iterate to get its new tokens as they come.

    Attributes:
      request: what was asked for.
      tokens: the new tokens so far, without the stop token.
      logprobs: of each token, if `Sampling.logprobs` asks for them, its own and those of the likeliest tokens by their ids.
      prompt_logprobs: the same of each token of the prompt, if the request asks for them; of the first one None.
      finish: why it ended; None while it goes on.
      cached_tokens: of the prompt, those that an earlier request had left in the cache.
      waited: seconds until the engine began with it; None before.
      seconds: what it took, in three parts: "prefill" until the first token, "decode" from there on, "compile".
    """

    def __init__(self, request: Admitted, more: Callable[[Handle, int], None], cancel: Callable[[Handle], None]):
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[tuple[float, dict[int, float]]] = []
        self.prompt_logprobs: list[tuple[float, dict[int, float]] | None] = []
        self.finish: Finish | None = None
        self.cached_tokens = 0
        self.waited: float | None = None
        self.seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
        self._error: Exception | None = None
        self._more, self._cancel = more, cancel
        self._since = time.perf_counter()

    def __repr__(self) -> str:
        state = self.finish.value if self.finish else "running"
        return f"Handle({self.prompt_tokens:,} prompt tokens, {self.new_tokens:,} new, {state}, {self.decode_rate:.1f} tokens/s)"

    def __iter__(self) -> Iterator[int]:
        """Each new token, from the first on.

        Raises:
          UserError: the request failed, say because its logits are not finite.
        """
        seen = 0
        while True:
            ended = self.finish is not None  # asked first: the last token may come between both
            while seen < len(self.tokens):
                yield self.tokens[seen]
                seen += 1
            if ended:
                self.check()
                return
            self._more(self, seen)

    def result(self) -> list[int]:
        """All new tokens, once they are there. Raises as the iteration does."""
        for _ in self:
            pass
        return self.tokens

    def check(self, name: str = "the prompt") -> None:
        """Raise what ended the request, if an error did; `name` says which request it was."""
        if self._error is not None:
            raise type(self._error)(f"{name}: {self._error}")

    def cancel(self) -> None:
        """End it now; what has come stays in `tokens`."""
        self._cancel(self)

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.ids)

    @property
    def new_tokens(self) -> int:
        return len(self.tokens)

    @property
    def decode_rate(self) -> float:
        """New tokens per second of decoding; the first comes from the prefill."""
        return (self.new_tokens - 1) / self.seconds["decode"] if self.new_tokens > 1 and self.seconds["decode"] > 0 else 0.0

    def begin(self) -> None:
        """(The engine) its prompt is being read; once more where it lost its place."""
        if self.waited is None:
            self.waited = time.perf_counter() - self._since

    def score(self, start: int, scores: Scores) -> None:
        """(The engine) how likely the tokens are that come behind places of the prompt, from `start` on."""
        most = self.request.prompt_logprobs
        if most is None:
            return
        known = self.prompt_logprobs = self.prompt_logprobs or [None]
        for place, own, top_N, ids_N in zip(itertools.count(start + 1), *(np.asarray(x_T).tolist() for x_T in scores), strict=False):
            if place == len(known) < self.prompt_tokens:  # a piece that is computed again is known
                known.append((own, dict(list(zip(ids_N, top_N, strict=True))[:most])))

    def add(self, token: int, sampled: Sampled | None, place: int) -> None:
        """(The engine) a token has come, at a place of what was sampled, which matters for log-probabilities."""
        if not self.tokens:
            self._count("prefill")
        most = self.request.sampling.logprobs
        if most is not None:
            assert sampled is not None
            assert sampled.logprob_B is not None
            assert sampled.top_ids_BN is not None
            assert sampled.top_logprobs_BN is not None
            likely = zip(sampled.top_ids_BN[place].tolist(), sampled.top_logprobs_BN[place].tolist(), strict=True)
            self.logprobs.append((float(sampled.logprob_B[place]), dict(list(likely)[:most])))
        self.tokens.append(token)

    def end(self, why: Finish, error: Exception | None = None) -> None:
        """(The engine) nothing more comes."""
        if self.finish is None:
            self._count("decode" if self.tokens else "prefill")
            self._error, self.finish = error, why

    def _count(self, phase: str) -> None:
        now = time.perf_counter()
        compiling = min(seconds_compiling(self._since), now - self._since)
        self.seconds["compile"] += compiling
        self.seconds[phase] += now - self._since - compiling
        self._since = now


class Stopped(UserError):
    """The engine was closed, or an error ended it."""
