"""The engine for an event loop: jobs go in, replies come out, portion by portion.

Always: what a reply has asked of the engine has ended when its block is left, however it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from maverick_jax.inference.engine import Engine
from maverick_jax.inference.handle import Stopped
from maverick_jax.serving.answer import Answer, Portion
from maverick_jax.serving.http.metrics import Metrics
from maverick_jax.serving.job import Job
from maverick_jax.serving.names import all_names, check_name
from maverick_jax.serving.pictures import Address, refuse_address
from maverick_jax.serving.prepare import Preparer
from maverick_jax.serving.reply import Reply

WORKERS = 32  # threads that read, tokenize, cut and fetch; most of them wait
Result = TypeVar("Result")


class Service:
    """What the server has to offer. Of one event loop; the engine has a thread of its own.

    Args:
      names: of the model, as clients may call it; the first one is what they are told. An adapter of the engine has its own.
      fetch: the bytes of a picture that is elsewhere.

    Raises:
      UserError: an adapter has a name of the model.

    Attributes:
      models: all names there are, those of the model first.
      prepare: makes requests of jobs.
      running: replies that are on their way.
      metrics: counts what they come to.
      stopping: the server shuts down, and takes no more requests.
    """

    def __init__(self, engine: Engine, names: list[str], fetch: Callable[[Address], bytes] = refuse_address):
        self.engine, self.names, self.models = engine, names, all_names(names, engine.adapters)
        told = {"adapters": engine.adapters, "routed_experts": engine.routed_experts}
        self.prepare = Preparer(engine.model, engine.limits.max_length, engine.grammars, fetch, **told)
        self.running: set[Reply] = set()
        self.metrics = Metrics([names[0], *engine.adapters], lambda: engine.occupancy, lambda: engine.load_ME)
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="maverick request")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Future[None] | None = None
        self._told = False  # and not yet passed on
        self._stopped: Stopped | None = None
        self.stopping = False
        engine.listen(self._tell)

    def start(self) -> None:
        """From here on, in this loop."""
        self._loop = asyncio.get_running_loop()
        self._news = self._loop.create_future()

    def stop(self) -> None:
        """(Any thread) end what is running, with an error for each that is not done."""
        self._stopped = Stopped("the server is shutting down: send the request again.")
        self._tell()

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """What may take milliseconds, or wait."""
        assert self._loop is not None
        return await self._loop.run_in_executor(self._pool, work)

    def submit(self, job: Job) -> Reply:
        """Ask the engine. For a thread of its own: it takes a while.

        Raises:
          UserError: the job cannot be done, or there are too many already.
        """
        if self._stopped is not None:
            raise self._stopped
        check_name(job.model, self.models)
        prepared = self.prepare(job, random.getrandbits(32))
        reply = Reply(prepared=prepared, answers=[], model=prepared.adapter or self.names[0], tokenizer=self.prepare.tokenizer)
        try:
            for request in prepared.requests:
                handle = self.engine.submit(request)
                reply.answers.append(Answer(handle, reply.tokenizer, job.stop, job.tools, stop_token=job.return_token_ids))
        except BaseException:
            reply.cancel()
            raise
        return reply

    @contextlib.asynccontextmanager
    async def asked(self, submit: Callable[[], Reply]) -> AsyncIterator[Reply]:
        """The reply that is submitted in a thread, while it is wanted."""
        submitting = asyncio.ensure_future(self.in_thread(submit))
        try:
            reply = await asyncio.shield(submitting)
        except asyncio.CancelledError:  # nobody waits for it any more, and it comes all the same
            submitting.add_done_callback(self._abandon)
            raise
        self.running.add(reply)
        try:
            yield reply
        finally:
            self.running.discard(reply)
            self.metrics.ended(reply)
            self._end(reply)

    def _abandon(self, submitting: asyncio.Future[Reply]) -> None:
        if not submitting.cancelled() and submitting.exception() is None:
            self._end(submitting.result())

    def _end(self, reply: Reply) -> None:
        if any(answer.handle.finish is None for answer in reply.answers):
            self._pool.submit(reply.cancel)  # it waits for the engine's turn

    async def portions(self, reply: Reply) -> AsyncIterator[tuple[int, Portion]]:
        """What comes of its answers, with their indices, until all have ended.

        Raises:
          UserError: one of them failed, or the server shuts down.
        """
        left = list(range(len(reply.answers)))
        while left:
            news = self._news
            assert news is not None
            if self._stopped is not None:
                raise self._stopped
            for index in left:
                answer = reply.answers[index]
                if answer.has_news:
                    portion = answer.read()
                    self.metrics.portion(answer, portion)
                    yield index, portion
            left = [index for index in left if reply.answers[index].finish is None]
            if left and not any(reply.answers[index].has_news for index in left):
                await asyncio.shield(news)

    def _tell(self) -> None:
        """(Any thread) there may be news of any handle."""
        if not self._told and self._loop is not None:
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._pass_on)

    def _pass_on(self) -> None:
        self._told = False
        if self._news is not None and self._loop is not None:
            news, self._news = self._news, self._loop.create_future()
            news.set_result(None)

    def close(self) -> None:
        """Nothing is asked any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
