"""A file of requests through one engine: it always has enough to do, and never more than it will soon get to.

Always: a request of the file is still to be read, or being prepared, or its answers are asked of the engine one after the other, or
its result is written; what is wrong with one is its own result.
"""

from __future__ import annotations

import collections
import dataclasses
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import NoRoom
from maverick_jax.inference.engine import Engine
from maverick_jax.inference.request import Full, Request
from maverick_jax.serving.answer import Answer
from maverick_jax.serving.batch.files import Line, Refused, Requests, Results
from maverick_jax.serving.failure import Failure
from maverick_jax.serving.names import all_names, check_name
from maverick_jax.serving.prepare import Prepared, Preparer
from maverick_jax.serving.reply import Reply

WORKERS = 4  # threads that tokenize and cut pictures while the devices work
AHEAD = 16  # requests of the file that are prepared before there is room for them
UNWRITTEN = 1024  # results that the disk may be behind: it takes milliseconds to keep one


@dataclasses.dataclass
class Tally:
    """How far a batch has come.

    Attributes:
      total: requests of the file.
      done, failed: those that have a result now.
      skipped: those that had one before.
      prompt_tokens, cached_tokens: of those that are done.
      new_tokens: of all, also of those that are not done.
      seconds: since it began.
    """

    total: int
    done: int = 0
    failed: int = 0
    skipped: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New ones."""
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"seconds": round(self.seconds, 3), "tokens_per_second": round(self.tokens_per_second, 2)}

    def __str__(self) -> str:
        return (
            f"{self.done:,} done, {self.failed:,} failed, {self.skipped:,} skipped of {self.total:,}; {self.prompt_tokens:,} prompt tokens "
            f"({self.cached_tokens:,} cached), {self.new_tokens:,} new in {self.seconds:.1f} s, {self.tokens_per_second:,.1f} tokens/s"
        )


class _Task:
    """A request of the file whose answers are asked for; it is over once it has a result."""

    def __init__(self, line: Line, reply: Reply):
        self.line, self.reply = line, reply
        self.left = len(reply.prepared.requests)
        self.over = False


def serve(
    engine: Engine, requests: Requests, results: Results, *, model: str, told: Callable[[Tally], object] = lambda tally: None
) -> Tally:
    """Answer the requests of a file that have no result yet; results are written as they come.

    Args:
      engine: without a thread of its own.
      model: its name in the results; where the engine has adapters, a line without `model` or with this one asks the model alone.
      told: called after each turn of the engine.

    Raises:
      UserError: the model was not loaded from a directory, or an adapter has its name; a file cannot be read or written. What is written
        stays.
    """
    return _Batch(engine, requests, results, model, told).serve()


class _Batch:
    def __init__(self, engine: Engine, requests: Requests, results: Results, model: str, told: Callable[[Tally], object]):
        self.engine, self.requests, self.results, self.model, self.told = engine, requests, results, model, told
        self.tally = Tally(len(requests))
        self.running: list[tuple[_Task, Answer]] = []
        self._names = all_names([model], engine.adapters)
        self._prepare = Preparer(engine.model, engine.limits.max_length, engine.grammars, adapters=engine.adapters)
        self._writer = ThreadPoolExecutor(1)
        self._written: collections.deque[Future[None]] = collections.deque()
        self._began = time.perf_counter()

    def serve(self) -> Tally:
        with ThreadPoolExecutor(WORKERS) as pool, self._writer:
            try:
                waiting = self._waiting(pool)
                first = next(waiting, None)
                while first or self.running:
                    while first and self._submit(*first):
                        first = next(waiting, None)
                    if self.running:
                        self.engine.step()
                        self._read()
                    self._tell()
            finally:
                for _, answer in self.running:
                    answer.handle.cancel()
        self._check_written(0)
        self._tell()
        return self.tally

    def _waiting(self, pool: ThreadPoolExecutor) -> Iterator[tuple[_Task, Request]]:
        """The file's requests for the engine, in order."""
        for line, prepared in self._prepared(pool):
            try:
                if self.engine.adapters:  # a file for a model alone may have been written for another one
                    check_name(line.job.model, self._names)
                ready = prepared.result()
                reply = Reply(prepared=ready, answers=[], model=ready.adapter or self.model, tokenizer=self._prepare.tokenizer)
            except Failure as failure:
                self._fail(line, failure, status=failure.status, code=failure.code)
            except UserError as error:
                self._fail(line, error)
            except Exception as error:  # of a picture's or a template's making
                self._fail(line, error, status=500)
            else:
                task = _Task(line, reply)
                yield from ((task, request) for request in reply.prepared.requests)

    def _prepared(self, pool: ThreadPoolExecutor) -> Iterator[tuple[Line, Future[Prepared]]]:
        """Some of them ahead of the one that is asked for."""
        ahead: collections.deque[tuple[Line, Future[Prepared]]] = collections.deque()
        for line in self.requests:
            if isinstance(line, Refused):
                self._write(self.results.refuse, line)
                self.tally.failed += 1
            elif line.custom_id in self.results.done:
                self.tally.skipped += 1
            else:
                # A line without a seed draws otherwise than the next one, and as it did when the batch is run again.
                seed = zlib.crc32(line.custom_id.encode("utf-8", "surrogatepass"))
                ahead.append((line, pool.submit(self._prepare, line.job, seed)))
            while len(ahead) > AHEAD:
                yield ahead.popleft()
        yield from ahead

    def _submit(self, task: _Task, request: Request) -> bool:
        """Whether it has been seen to: there was room, or it needs none."""
        if task.over:  # another of its answers failed
            return True
        if len(self.running) >= 2 * self.engine.limits.slots:
            return False
        try:
            handle = self.engine.submit(request)
        except Full:
            if not self.running:
                raise
            return False
        except UserError as error:
            self._end(task, error)
            return True
        job = task.line.job
        task.reply.answers.append(Answer(handle, self._prepare.tokenizer, job.stop, job.tools, stop_token=job.return_token_ids))
        self.running.append((task, task.reply.answers[-1]))
        return True

    def _read(self) -> None:
        """What the engine has drawn for everyone."""
        ended = []
        for task, answer in self.running:
            if task.over:
                continue
            known = answer.new_tokens
            try:
                if answer.read().finish:
                    ended.append(answer)
                    task.left -= 1
            except UserError as error:
                self._end(task, error)
            self.tally.new_tokens += answer.new_tokens - known
            if not task.left:
                self._end(task)
        self.running = [(task, answer) for task, answer in self.running if not task.over and answer not in ended]

    def _end(self, task: _Task, error: UserError | None = None) -> None:
        """Its result: all answers, or what one of them ran into."""
        task.over = True
        if error is not None:
            task.reply.cancel()
            return self._fail(task.line, error)
        self._write(self.results.succeed, task.line.custom_id, task.line.dialect.body_of(task.reply))
        self.tally.done += 1
        self.tally.prompt_tokens += task.reply.prompt_tokens
        self.tally.cached_tokens += task.reply.cached_tokens

    def _fail(self, line: Line, error: Exception, status: int = 400, code: str | None = None) -> None:
        code = "context_length_exceeded" if isinstance(error, NoRoom) else code
        said = str(error) if isinstance(error, UserError | Failure) else f"{type(error).__name__}: {error}"
        self._write(self.results.fail, line.custom_id, said, status=status, code=code)
        self.tally.failed += 1

    def _write(self, write: Callable[..., None], *args: Any, **settings: Any) -> None:
        self._written.append(self._writer.submit(write, *args, **settings))
        self._check_written(UNWRITTEN)

    def _check_written(self, behind: int) -> None:
        """Raise what a disk said. All but so many are written then."""
        while len(self._written) > behind or (self._written and self._written[0].done()):
            self._written.popleft().result()

    def _tell(self) -> None:
        self.tally.seconds = time.perf_counter() - self._began
        self.told(self.tally)
