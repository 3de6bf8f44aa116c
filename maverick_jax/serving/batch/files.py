"""Requests from one file of JSON lines, results to another: OpenAI's batch format.

Always: every line of the results but the last is a whole result on the disk, and the last is one or was cut short by a sudden end.
A request is done when its result is a success; what failed is tried again when the batch is run again, and its old result is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from maverick_jax.convert.build.durable import sync
from maverick_jax.errors import UserError
from maverick_jax.inference.checks import shown
from maverick_jax.json_file import MAX_VALUES, parse_json
from maverick_jax.serving.dialect import Dialect
from maverick_jax.serving.dialects import chat, completions
from maverick_jax.serving.job import Job

LONGEST = 64 << 20  # bytes of a request; pictures are in it, with a third more bytes than their files have
BEGINNING = b'{"id": "batch_req_'  # of every result
BOM = b"\xef\xbb\xbf"


DIALECTS: dict[str, Dialect] = {chat.URL: chat, completions.URL: completions}


class Line(NamedTuple):
    """A request of the file.

    Attributes:
      custom_id: the requester's name for it.
      dialect: that it is written in, and answered in.
    """

    custom_id: str
    dialect: Dialect
    job: Job


class Refused(NamedTuple):
    """A line that asks for nothing that can be done.

    Attributes:
      number: of the line, counted from 1.
      custom_id: None where it could not be read.
      code: OpenAI's word for what is wrong.
      message: one line.
    """

    number: int
    custom_id: str | None
    code: str
    message: str


class Requests:
    """The requests of a file, read line by line each time they are iterated.

    Raises:
      UserError: there is no such file, it cannot be read, or it has no line.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.count = sum(1 for _ in self._lines())
        if not self.count:
            raise UserError(f"{self.path} has no request: expected a JSON object per line.")

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Line | Refused]:
        seen: dict[str, int] = {}
        for number, line in self._lines():
            yield _read(number, line, seen)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Those that are not blank, with their numbers."""
        try:
            if not self.path.is_file():
                raise UserError(f"{self.path} is no file: give one of requests, a JSON object per line.")
            with self.path.open("rb") as stream:
                for number, line in enumerate(_bounded_lines(stream), 1):
                    if line := line.removeprefix(BOM if number == 1 else b"").strip():
                        yield number, line
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({os.strerror(error.errno or 0)}).") from error


def _bounded_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines of which one that is too long is cut there, to be refused; the rest of it is not kept in memory."""
    while line := stream.readline(LONGEST + 1):
        rest = line
        while len(rest) > LONGEST and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST + 1)
        yield line


def _read(number: int, line: bytes, seen: dict[str, int]) -> Line | Refused:
    """A request, unless something is wrong with it; `seen` are the ids of earlier lines, with their numbers."""
    custom_id = None
    try:
        if len(line) > LONGEST:
            return Refused(number, None, "line_too_long", f"line {number} has more than {LONGEST:,} bytes: shrink its pictures.")
        try:
            request = parse_json(line, max_values=MAX_VALUES)
        except (ValueError, RecursionError) as error:
            return Refused(number, None, "invalid_json_line", f"line {number} is not valid JSON ({error}).")
        if not isinstance(request, dict):
            return Refused(number, None, "invalid_json_line", f"line {number} is {shown(request)}: expected a JSON object.")
        custom_id, wrong = _named(request, number)
        if wrong:
            return wrong
        if custom_id in seen:
            said = f"line {number} has the custom_id {shown(custom_id)} of line {seen[custom_id]}: give each its own."
            return Refused(number, custom_id, "duplicate_custom_id", said)
        seen[custom_id] = number
        return _line(number, custom_id, request)
    except UserError as error:
        return Refused(number, custom_id, "invalid_request_error", f"line {number}: {error}")


def _named(request: dict[str, Any], number: int) -> tuple[str, Refused | None]:
    custom_id = request.get("custom_id")
    if isinstance(custom_id, str) and custom_id:
        return custom_id, None
    said = f"line {number} has the custom_id {shown(custom_id)}: expected a text, another for each line."
    return "", Refused(number, None, "missing_required_parameter", said)


def _line(number: int, custom_id: str, request: dict[str, Any]) -> Line | Refused:
    method, url, body = request.get("method"), request.get("url"), request.get("body")
    if method != "POST":
        return Refused(number, custom_id, "invalid_method", f"line {number} has the method {shown(method)}: expected POST.")
    dialect = DIALECTS.get(url) if isinstance(url, str) else None
    if dialect is None:
        expected = " or ".join(DIALECTS)
        return Refused(number, custom_id, "invalid_url", f"line {number} has the url {shown(url)}: expected {expected}.")
    if not isinstance(body, dict):
        return Refused(number, custom_id, "missing_required_parameter", f"line {number} has the body {shown(body)}: expected an object.")
    job = dialect.read(body)
    if job.stream:
        raise UserError("stream is true: the answers of a batch come whole.")
    if job.unknown:  # a misspelt max_tokens would cost a night
        raise UserError(job.unknown[0])
    return Line(custom_id, dialect, job)


class Results:
    """The file of results. What an earlier run has finished in it stays; what it cut short or failed at is taken out. One that was
    made for nothing goes again.

    Attributes:
      done: ids of the requests that are finished.

    Raises:
      UserError: it cannot be written, another process writes it, or it is a file of something else, which stays as it is.
    """

    def __init__(self, path: str | Path, requests: Requests):
        self.path = Path(path).resolve()
        self._lock = threading.Lock()
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"{self.path} is no file: name one for the results.")
        if self.path.exists() and self.path.samefile(requests.path):
            raise UserError(f"{self.path} is the file of requests: name another for the results.")
        self._is_new = not self.path.exists()
        try:
            self._descriptor = _open_alone(self.path, os.O_RDWR)
            try:
                self.done = self._clean()
                self._end = os.fstat(self._descriptor).st_size
            except BaseException:
                os.close(self._descriptor)
                raise
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({os.strerror(error.errno or 0)}): name another file.") from error

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._is_new and not self._end:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def succeed(self, custom_id: str, body: dict[str, Any]) -> None:
        """Write the answer to a request, in the form of its url."""
        self._write(custom_id, _response(200, body))

    def fail(self, custom_id: str, message: str, *, status: int = 400, code: str | None = None) -> None:
        """Write what went wrong with a request: 400 where it cannot be done, 5xx where it could be another time."""
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._write(custom_id, _response(status, {"error": {"message": message, "type": kind, "param": None, "code": code}}))

    def refuse(self, refused: Refused) -> None:
        """Write why a line was not done."""
        error = {"code": refused.code, "message": refused.message, "line": refused.number}
        self._write(refused.custom_id, {"response": None, "error": error})

    def _write(self, custom_id: str | None, outcome: dict[str, Any]) -> None:
        line = json.dumps({"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, **outcome}, ensure_ascii=False)
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(self._descriptor, left) :]
                os.fsync(self._descriptor)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self._end)
                raise UserError(f"{self.path} cannot be written ({os.strerror(error.errno or 0)}); run the batch again then.") from error
            self._end += len(data)

    def _clean(self) -> set[str]:
        """Leave the successes, in a file that takes the place of this one when it is whole on the disk. Returns their ids."""
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            done, changed = self._copy_successes(partial)
            if changed:
                mine = _open_alone(partial, os.O_WRONLY)
                partial.replace(self.path)
                os.close(self._descriptor)
                self._descriptor = mine
        finally:
            partial.unlink(missing_ok=True)
        sync(self.path.parent)
        return done

    def _copy_successes(self, partial: Path) -> tuple[set[str], bool]:
        """Their ids, and whether the copy is another than this file."""
        done: set[str] = set()
        changed = False
        with self.path.open("rb") as results, partial.open("wb") as kept:
            shutil.copymode(self.path, partial)
            for number, line in enumerate(results, 1):
                if (custom_id := _finished(line, f"{self.path} line {number}")) is not None:
                    done.add(custom_id)
                    kept.write(line.rstrip(b"\n") + b"\n")
                changed |= custom_id is None or not line.endswith(b"\n")
            kept.flush()
            os.fsync(kept.fileno())
        return done, changed


def _open_alone(path: Path, mode: int) -> int:
    """A descriptor that appends, and that no other process has."""
    descriptor = os.open(path, mode | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{path} is being written by another process: wait for it, or name another file.") from error
    except OSError:  # there are file systems without locks
        pass
    return descriptor


def _response(status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"response": {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body}, "error": None}


def _finished(line: bytes, name: str) -> str | None:
    """The id of a success; None of what is to be done again.

    Raises:
      UserError: the line is no result, nor the beginning of one.
    """
    torn = line.rstrip(b"\0")  # a power cut may leave zeros
    if line.endswith(b"\n") or not BEGINNING.startswith(torn[: len(BEGINNING)]):
        torn = None
    try:
        result = json.loads(line)
        success, custom_id = result["response"] is not None and result["response"]["status_code"] == 200, result["custom_id"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        if torn is None:
            raise UserError(f"{name} is no result of a batch: name another file for the results.") from error
        return None
    return custom_id if success else None
