"""An engine that says what it is told to, a token at a time, at once or slowly: for what stands on an engine, without a model's whims."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable

import numpy as np

from maverick_jax.inference.admission import admitted
from maverick_jax.inference.grammar import Grammars
from maverick_jax.inference.handle import Handle
from maverick_jax.inference.request import Finish, Full, Request
from maverick_jax.inference.serving import Occupancy
from maverick_jax.inference.speculate import Acceptance
from oracle.scripted import CONFIG, TOKENIZER, Model


class ScriptedEngine:
    """Stands for `Engine`.

    Args:
      answer: what is said to a prompt, which it gets as text.
      pause: seconds in front of each token.
      most: requests at once.

    Attributes:
      running: requests that have not ended.
      seen: all requests.
      handles: theirs.
    """

    def __init__(self, answer: Callable[[str], str | Exception], *, pause: float = 0.0, most: int = 1000, max_length: int = 1 << 20):
        self.model, self.limits = Model(), types.SimpleNamespace(max_length=max_length, slots=most)
        self.routed_experts, self.adapters = False, ()
        self.grammars = Grammars(TOKENIZER, vocabulary=CONFIG.text.vocab_size, end_ids=CONFIG.eos_token_id)
        self.running: list[Handle] = []
        self.seen: list[Request] = []
        self.handles: list[Handle] = []
        self._answer, self._pause, self._most, self._told = answer, pause, most, []
        self._news = threading.Condition()

    @property
    def occupancy(self) -> Occupancy:
        return Occupancy(len(self.running), 0, 0.0, 0, Acceptance())

    @property
    def load_ME(self) -> np.ndarray:
        return np.array([[3, 1, 0, 0]])

    def listen(self, told: Callable[[], object]) -> None:
        self._told.append(told)

    def submit(self, request: Request) -> Handle:
        checked = admitted(request, CONFIG, self.limits.max_length)
        if len(self.running) >= self._most:
            raise Full("as many requests wait as may wait.")
        handle = Handle(checked, lambda *_: None, self._cancel)
        self.running.append(handle)
        self.seen.append(request)
        self.handles.append(handle)
        threading.Thread(target=self._say, args=(handle,), daemon=True).start()
        return handle

    def _say(self, handle: Handle) -> None:
        said = self._answer(b"".join(map(TOKENIZER.spelling, handle.request.ids.tolist())).decode("utf-8", "replace"))
        if isinstance(said, Exception):
            return self._end(handle, Finish.ERROR, said)
        if handle.request.prompt_logprobs is not None:
            handle.prompt_logprobs = [None, *[(-1.0, {})] * (handle.prompt_tokens - 1)]
        for token in TOKENIZER.encode(said):
            time.sleep(self._pause)
            with self._news:
                if handle.finish is not None:
                    return
                handle.tokens.append(token)
            self._tell()
            if len(handle.tokens) == handle.request.max_new_tokens:
                return self._end(handle, Finish.LENGTH)
        self._end(handle, Finish.STOP)

    def _cancel(self, handle: Handle) -> None:
        self._end(handle, Finish.CANCELLED)

    def _end(self, handle: Handle, why: Finish, error: Exception | None = None) -> None:
        with self._news:
            handle.end(why, error)
            if handle in self.running:
                self.running.remove(handle)
        self._tell()

    def _tell(self) -> None:
        for told in self._told:
            told()
