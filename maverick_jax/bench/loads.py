"""Requests for an engine, and when each of their tokens came: everybody at once, or at random times."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from maverick_jax.config import Config
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.handle import Handle
from maverick_jax.inference.request import Request


@dataclass
class Timed:
    """A request and its times, in seconds since the load began.

    Attributes:
      due: when it came, whether or not the engine had time for it.
      tokens: when each of its new tokens was there.
    """

    request: Request
    due: float = 0.0
    tokens: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds from its coming to its first token."""
        return self.tokens[0] - self.due

    @property
    def between(self) -> list[float]:
        """Seconds from each token to the next. Tokens that came in one step, as drafts do, have none between them."""
        return [after - before for before, after in pairwise(self.tokens)]


def random_prompts(config: Config, count: int, length: int, seed: int) -> list[np.ndarray]:
    """Prompts of tokens that are all equally likely, but for those of pictures."""
    known = np.setdiff1d(np.arange(config.text.vocab_size), [config.image_token_index])
    return list(np.random.default_rng(seed).choice(known, (count, length)))


def ask(prompt: np.ndarray, new: int) -> Request:
    """For so many tokens, whatever they are."""
    return Request(ids=prompt, max_new_tokens=new, stop_ids=())


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """When requests come that know nothing of each other: seconds, `rate` of them in each on average (a Poisson process)."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)).tolist()


def serve(engine: Engine, requests: Sequence[Request], due: Sequence[float] | None = None) -> list[Timed]:
    """Send requests to an engine when they are due, None: all at once, and wait for their ends.

    Raises:
      UserError: one of them failed.
    """
    found = [Timed(request, when) for request, when in zip(requests, due or [0.0] * len(requests), strict=True)]
    coming = deque(sorted(found, key=lambda timed: timed.due))
    running: list[tuple[Handle, Timed]] = []
    began = time.perf_counter()
    while coming or running:
        now = time.perf_counter() - began
        while coming and coming[0].due <= now:
            timed = coming.popleft()
            running.append((engine.submit(timed.request), timed))
        if not running:
            time.sleep(coming[0].due - now)
            continue
        engine.step()
        now = time.perf_counter() - began
        for handle, timed in running:
            timed.tokens += [now] * (handle.new_tokens - len(timed.tokens))
            handle.check()
        running = [(handle, timed) for handle, timed in running if not handle.finish]
    return found


def decoding(served: Sequence[Timed]) -> tuple[int, float]:
    """New tokens that came while all of the requests were decoding, and the seconds that this was."""
    begin, end = max(timed.tokens[0] for timed in served), min(timed.tokens[-1] for timed in served)
    return sum(begin < when <= end for timed in served for when in timed.tokens), max(0.0, end - begin)
