"""`maverick batch`: a file in, a file out, and again until all is done."""

import json
import sys

import pytest

from maverick_jax.serving import batch as batches

SMALL = ("--mesh", "expert=1", "--slots", 2, "--max-length", 128)


def line(custom_id: str, **body) -> str:
    body = {"prompt": "What is", "max_tokens": 2} | body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body})


@pytest.fixture
def files(tmp_path):
    """Two requests, the second of which has a setting that cannot be."""
    (tmp_path / "in.jsonl").write_text(f"{line('a')}\n{line('b', temperature=-500)}\n")
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def outcomes(out) -> list[tuple[str, int]]:
    results = map(json.loads, out.read_text().splitlines())
    return sorted((result["custom_id"], result["response"]["status_code"]) for result in results)


def test_until_all_is_done(maverick, files, monkeypatch):
    """What failed ends it with 1 and is tried again, once it is mended; what is done is not. A bar is for terminals alone."""
    first = maverick("batch", *files, *SMALL, "--trace", files[1].with_name("trace"))
    assert (first.status, first.out) == (1, "")
    room, tally = first.err.splitlines()
    assert room.startswith("2 slots of up to 128 tokens")
    assert tally.startswith("1 done, 1 failed, 0 skipped of 2; 3 prompt tokens (0 cached), ")
    assert tally.endswith("tokens/s")
    assert outcomes(files[1]) == [("a", 200), ("b", 400)]
    assert json.loads(files[1].read_text().splitlines()[-1])["response"]["body"].get("model", "mini") == "mini"
    assert set(json.loads(files[1].with_name("trace").read_text().splitlines()[0])) == {"limits"}
    files[0].write_text(files[0].read_text().replace("-500", "5"))
    again = maverick("batch", *files, *SMALL, "--json")
    assert (again.status, again.err) == (0, "")
    tally = json.loads(again.out)
    assert (tally["done"], tally["failed"], tally["skipped"], tally["total"]) == (1, 0, 1, 2)
    assert outcomes(files[1]) == [("a", 200), ("b", 200)]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = maverick("batch", *files, *SMALL).err
    assert "2/2" in shown
    assert "tokens/s" in shown.partition("2/2")[2].partition("\n")[0]


def test_stopped_it_says_how_to_go_on(maverick, files, monkeypatch):
    """And an empty file of results is not left."""

    def stop(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(batches, "serve", stop)
    result = maverick("batch", *files, *SMALL)
    assert result.status == 130
    assert result.err.splitlines()[-1] == (
        f"maverick: interrupted. What is finished stays in {files[1]}: run the same command again to go on."
    )
    assert not files[1].exists()
