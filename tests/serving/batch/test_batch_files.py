"""A batch file: an error for its line alone, and results that survive any end of the process."""

import errno
import json
import os
import subprocess
import sys

import pytest

from maverick_jax.errors import UserError
from maverick_jax.serving.batch import Refused, Requests, Results, files


def line(custom_id: str, /, **changes) -> str:
    body = {"prompt": custom_id, "max_tokens": 3}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body} | changes)


@pytest.fixture
def batch(tmp_path):
    """Writes a file of requests, and names one for results."""

    def write(*lines: str, text: str | None = None) -> tuple[Requests, os.PathLike]:
        (tmp_path / "in.jsonl").write_text("\n".join(lines) if text is None else text, encoding="utf-8", errors="surrogateescape")
        return Requests(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"

    return write


def run(requests: Requests, out, *, failing=()) -> list[str]:
    """What a batch does, without a model. Returns the ids it did."""
    did = []
    with Results(out, requests) as results:
        for request in requests:
            if isinstance(request, Refused):
                results.refuse(request)
            elif request.custom_id in failing:
                results.fail(request.custom_id, "too long", code="context_length_exceeded")
            elif request.custom_id not in results.done:
                results.succeed(request.custom_id, {"text": f"answer to {request.custom_id}"})
                did.append(request.custom_id)
    return did


def read(out) -> list[dict]:
    return [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]


def test_results_have_the_form_of_openai(batch):
    """Success, failure and refusal are told apart as its clients tell them apart."""
    requests, out = batch(line("a"), line("b"), "{")
    run(requests, out, failing=["b"])
    good, failed, refused = read(out)
    assert [list(result) for result in (good, failed, refused)] == [["id", "custom_id", "response", "error"]] * 3
    assert good["id"].startswith("batch_req_")
    assert good["error"] is failed["error"] is refused["response"] is refused["custom_id"] is None
    assert (good["custom_id"], good["response"]["status_code"], good["response"]["body"]) == ("a", 200, {"text": "answer to a"})
    assert failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"] == {
        "message": "too long",
        "type": "invalid_request_error",
        "param": None,
        "code": "context_length_exceeded",
    }
    assert (refused["error"]["code"], refused["error"]["line"]) == ("invalid_json_line", 3)


BROKEN = {
    "no JSON": ("{'custom_id': 'x'}", "invalid_json_line", "is not valid JSON"),
    "cut short": (line("x")[:-3], "invalid_json_line", "is not valid JSON"),
    "a list": ("[1]", "invalid_json_line", r"is \[1\]"),
    "no UTF-8": ("\udcff", "invalid_json_line", "is not valid JSON"),
    "nested too deep": ("[" * 100_000, "invalid_json_line", "is not valid JSON"),
    "no name": (line("x", custom_id=None), "missing_required_parameter", "custom_id None"),
    "a number for a name": (line("x", custom_id=5), "missing_required_parameter", "custom_id 5"),
    "the name of another": (line("first"), "duplicate_custom_id", "'first' of line 1"),
    "another method": (line("x", method="GET"), "invalid_method", "method 'GET'"),
    "another url": (line("x", url="/v1/embeddings"), "invalid_url", "'/v1/embeddings'"),
    "an address for a url": (line("x", url=["/v1/completions"]), "invalid_url", "/v1/completions"),
    "no body": (line("x", body=None), "missing_required_parameter", "body None"),
    "a bad body": (line("x", body={"prompt": 5}), "invalid_request_error", "line 2: prompt is 5"),
    "a misspelt field": (line("x", body={"prompt": "x", "max_token": 5}), "invalid_request_error", "did you mean max_tokens"),
    "a stream": (line("x", body={"prompt": "x", "stream": True}), "invalid_request_error", "stream is true"),
}


@pytest.mark.parametrize("text, code, says", BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_its_own_error(batch, text, code, says):
    """The lines around it are done."""
    requests, out = batch(line("first"), text, line("last"))
    assert run(requests, out) == ["first", "last"]
    (refused,) = [request for request in requests if isinstance(request, Refused)]
    assert (refused.number, refused.code) == (2, code)
    with pytest.raises(UserError, match=says):
        raise UserError(refused.message)


def test_a_line_that_is_too_long_is_not_kept_in_memory(batch, monkeypatch):
    """Nor does it take the next one with it."""
    monkeypatch.setattr(files, "LONGEST", 500)
    requests, _ = batch(line("first"), line("x", body={"prompt": "x" * 1600}), line("last"))
    first, refused, last = requests
    assert (first.custom_id, refused.code, refused.number, last.custom_id) == ("first", "line_too_long", 2, "last")


def test_blank_lines_and_a_byte_order_mark_are_nothing(batch):
    """Editors add them; the numbers of lines stay."""
    requests, _ = batch(text=f"\ufeff{line('a')}\r\n\n  \n{line('b')}\n{{")
    assert len(requests) == 3
    assert [getattr(request, "custom_id", None) for request in requests] == ["a", "b", None]
    assert [request.number for request in requests if isinstance(request, Refused)] == [5]


def test_what_is_finished_is_not_done_again_and_what_failed_is(batch):
    """And each has one result at the end, whatever it had before."""
    requests, out = batch(line("a"), line("b"), line("a"), line("c"))
    assert run(requests, out, failing=["b"]) == ["a", "c"]
    kept = [result for result in read(out) if result["response"] and result["response"]["status_code"] == 200]
    assert run(requests, out) == ["b"]
    results = read(out)
    assert results[:2] == kept
    assert [result["error"]["code"] for result in results if result["error"]] == ["duplicate_custom_id"]
    assert sorted(result["custom_id"] for result in results if not result["error"]) == ["a", "b", "c"]


def test_a_result_cut_at_any_byte_is_made_again(batch, monkeypatch):
    """A whole one that lacks only its end of line stays; a power cut may leave zeros behind the cut."""
    requests, out = batch(line("a"), line("é"))
    run(requests, out)
    whole = out.read_bytes()
    first, second = whole.splitlines(keepends=True)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for cut in range(len(whole)):
        out.write_bytes(whole[:cut])
        kept = [part for part in (first, second) if len(part) <= cut + 1][: 1 + (cut + 1 >= len(whole))]
        with Results(out, requests) as results:
            assert len(results.done) == len(kept)
        assert out.read_bytes() == b"".join(kept)
    out.write_bytes(first + second[:30] + bytes(100))
    with Results(out, requests) as results:
        assert results.done == {"a"}
    assert out.read_bytes() == first


def test_results_keep_any_text(batch):
    """Half characters too, which a model's bytes can be."""
    requests, out = batch(line("a"))
    (job,) = requests
    with Results(out, requests) as results:
        results.succeed(job.custom_id, {"text": "é\n\u2028\ud83d"})
    assert json.loads(out.read_bytes())["response"]["body"]["text"] == "é\n\u2028\ud83d"


@pytest.mark.parametrize(
    "content", [b"my notes\n", b"my notes", b'{"id": "batch_req_1"}\n', b"\x00\x01\xff", b"[1, 2]\n", b'{"id": 5'], ids=repr
)
def test_a_file_of_something_else_stays_as_it_is(batch, content):
    """Somebody named the wrong file."""
    requests, out = batch(line("a"))
    out.write_bytes(content)
    with pytest.raises(UserError, match=r"line 1 is no result of a batch: name another file"):
        Results(out, requests)
    assert out.read_bytes() == content
    assert sorted(file.name for file in out.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_two_processes_do_not_write_one_file(batch):
    """Each would do what the other does."""
    requests, out = batch(line("a"), line("b"))
    run(requests, out, failing=["b"])
    with Results(out, requests), pytest.raises(UserError, match="is being written by another process"):
        Results(out, requests)
    Results(out, requests).close()


def test_files_that_cannot_be_used(batch, tmp_path):
    """One line each, and nothing is made."""
    with pytest.raises(UserError, match="has no request"):
        batch(text="\n \n")
    requests, out = batch(line("a"))
    with pytest.raises(UserError, match="is the file of requests"):
        Results(requests.path, requests)
    with pytest.raises(UserError, match="is no file"):
        Results(tmp_path, requests)
    with pytest.raises(UserError, match=r"cannot be written \(No such file"):
        Results(tmp_path / "none" / "out.jsonl", requests)
    with pytest.raises(UserError, match="is no file"):
        Requests(tmp_path / "none.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
    assert not out.exists()


def test_a_file_made_for_nothing_goes_again(batch):
    """The model was not found, say; but one that somebody made stays."""
    requests, out = batch(line("a"))
    Results(out, requests).close()
    assert not out.exists()
    out.touch()
    Results(out, requests).close()
    assert out.exists()
    out.unlink()
    run(requests, out)
    assert len(read(out)) == 1


def test_a_full_disk_leaves_no_half_result(batch, monkeypatch):
    """What was written of the line is taken back, so that the next one is not written behind it."""
    requests, out = batch(line("a"), line("b"))
    a, b = requests
    write = os.write
    with Results(out, requests) as results:
        results.succeed(a.custom_id, {})
        before = out.read_bytes()

        def full(descriptor, data):
            if len(data) > 20:
                return write(descriptor, data[:20])
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(UserError, match="No space left"):
            results.succeed(b.custom_id, {"text": "x" * 5})
        monkeypatch.undo()
        assert out.read_bytes() == before
        results.succeed(b.custom_id, {})
    assert [result["custom_id"] for result in read(out)] == ["a", "b"]


# Forks for each attempt; the child ends itself at one of its own writes (half of it done), syncs or renames.
KILLED = """
import os, pathlib, random, signal, sys
sys.path.insert(0, "TESTS")
import test_batch_files as here
from maverick_jax.serving.batch import Requests
requests, out, rng = Requests(sys.argv[1]), pathlib.Path(sys.argv[2]), random.Random(0)
write, kills = os.write, 0

def watched(function):
    def call(*args):
        global left
        left -= 1
        if not left:
            if function is write:
                write(args[0], bytes(args[1])[: rng.randrange(len(args[1]))])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call

while True:
    left, failing = rng.randrange(1, 8), rng.sample([f"r{i}" for i in range(16)], 4)
    if (child := os.fork()) == 0:
        os.write, os.fsync, pathlib.Path.replace = watched(write), watched(os.fsync), watched(pathlib.Path.replace)
        here.run(requests, out, failing=failing if rng.random() < 0.5 else ())
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0 and len(here.read(out)) == 16 and all(r["response"]["status_code"] == 200 for r in here.read(out)):
        break
    kills += 1
    with here.Results(out, requests) as results:
        assert len(results.done) == len(here.read(out))
print(kills)
"""


def test_killed_at_any_moment_it_goes_on(batch, tmp_path):
    """No result is lost, none is there twice, none is half there."""
    requests, out = batch(*(line(f"r{i}") for i in range(16)))
    code = KILLED.replace("TESTS", os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", code, requests.path, out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 4
    assert sorted(result["custom_id"] for result in read(out)) == sorted(f"r{i}" for i in range(16))
    assert {result["response"]["body"]["text"] for result in read(out)} == {f"answer to r{i}" for i in range(16)}
    assert {file.name for file in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}
