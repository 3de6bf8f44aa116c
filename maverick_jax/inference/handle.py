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
      stop_token: the token that ended it, if one did, and `stop_logprob` what `logprobs` would say of it.
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
        self.stop_token: int | None = None
        self.stop_logprob: tuple[float, dict[int, float]] | None = None
        self.finish: Finish | None = None
        self.cached_tokens = 0
        self.waited: float | None = None
        self.seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
        self._routed: list[tuple[int, np.ndarray]] = []
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

    @property
    def routed_experts(self) -> np.ndarray:
        """[T, M] unsigned: the expert of each mixture that each token went to, if the request asks for them.

        From the prompt's token on that the request names, up to the last one that was computed: what was drawn last never is. A
        request that lost its place has those of the second time.
        """
        first = self.request.routed_experts_prompt_start
        if first is None or not self._routed:
            return np.zeros((0, 0), np.uint8)
        drawn = self.new_tokens + (self.stop_token is not None)
        expert_TM = np.zeros((self.prompt_tokens + max(drawn - 1, 0), self._routed[0][1].shape[1]), self._routed[0][1].dtype)
        for start, piece_TM in self._routed:  # of a draft that was not taken the next step knows better
            expert_TM[start : start + len(piece_TM)] = piece_TM[: max(len(expert_TM) - start, 0)]
        return expert_TM[first:]

    def begin(self) -> None:
        """(The engine) its prompt is being read; once more where it lost its place."""
        if self.waited is None:
            self.waited = time.perf_counter() - self._since

    def observe(self, start: int, scores: Scores | None, expert_TM: np.ndarray | None) -> None:
        """(The engine) from `start` on: how likely the prompt's tokens are that come behind these places, and the experts of these."""
        if expert_TM is not None and self.request.routed_experts_prompt_start is not None:
            self._routed.append((start, expert_TM))
        most = self.request.prompt_logprobs
        if scores is None or most is None:
            return
        known = self.prompt_logprobs = self.prompt_logprobs or [None]
        for place, own, top_N, ids_N in zip(itertools.count(start + 1), *(np.asarray(x_T).tolist() for x_T in scores), strict=False):
            if place == len(known) < self.prompt_tokens:  # a piece that is computed again is known
                known.append((own, dict(list(zip(ids_N, top_N, strict=True))[:most])))

    def add(self, token: int, sampled: Sampled | None, place: int) -> None:
        """(The engine) a token has come, at a place of what was sampled, which matters for log-probabilities."""
        if not self.tokens:
            self._count("prefill")
        if (logprob := self._logprob(sampled, place)) is not None:
            self.logprobs.append(logprob)
        self.tokens.append(token)

    def stop(self, token: int, sampled: Sampled | None, place: int) -> None:
        """(The engine) a token has come that ends it."""
        self.stop_token, self.stop_logprob = token, self._logprob(sampled, place)

    def _logprob(self, sampled: Sampled | None, place: int) -> tuple[float, dict[int, float]] | None:
        most = self.request.sampling.logprobs
        if most is None:
            return None
        assert sampled is not None
        assert sampled.logprob_B is not None
        assert sampled.top_ids_BN is not None
        assert sampled.top_logprobs_BN is not None
        likely = zip(sampled.top_ids_BN[place].tolist(), sampled.top_logprobs_BN[place].tolist(), strict=True)
        return float(sampled.logprob_B[place]), dict(list(likely)[:most])

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
