"""A model directory in an object store: loaded from there, by a server that answers as Google Cloud Storage does."""

import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from maverick_jax.assets import mini_directory
from maverick_jax.checkpoint import resolve
from maverick_jax.convert import convert
from maverick_jax.convert.build import remote
from maverick_jax.errors import UserError

BUCKET = "models-of-ours"
ROOT = Path(__file__).parents[2]
COMPARE = """
import sys, jax, numpy as np
from flax import nnx
import maverick_jax as mj
from maverick_jax.cli.main import main
there, here = (jax.tree.leaves(nnx.state(mj.load(path))) for path in sys.argv[1:])
assert all(np.array_equal(a, b) for a, b in zip(there, here, strict=True))
assert mj.Chat(mj.load(sys.argv[1])).tokenizer.encode("What")
sys.exit(main(["inspect", sys.argv[1]]))
"""


class Server(http.server.ThreadingHTTPServer):
    """Says nothing when a client hangs up."""

    def handle_error(self, request, client_address) -> None:
        pass


class Store(http.server.BaseHTTPRequestHandler):
    """The reading half of the JSON API, over the files of `root`."""

    root: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        _, _, name = url.path.partition("/o/")
        name = urllib.parse.unquote(name)
        if not name:
            self._answer(200, json.dumps(self._list(query.get("prefix", ""), query.get("delimiter"))).encode())
        elif not (self.root / name).is_file():
            self._answer(404, b"{}")
        elif query.get("alt") == "media":
            self._send(name)
        else:
            self._answer(200, json.dumps(self._describe(name)).encode())

    def _list(self, prefix: str, delimiter: str | None) -> dict:
        every = sorted(str(file.relative_to(self.root)) for file in self.root.rglob("*") if file.is_file())
        inside = [name for name in every if name.startswith(prefix)]
        folders = {prefix + name[len(prefix) :].split("/")[0] + "/" for name in inside if delimiter and "/" in name[len(prefix) :]}
        items = [self._describe(name) for name in inside if not any(name.startswith(folder) for folder in folders)]
        return {"items": items, "prefixes": sorted(folders)}

    def _describe(self, name: str) -> dict:
        when = {"updated": "2025-01-01T00:00:00Z", "timeCreated": "2025-01-01T00:00:00Z"}
        return {"name": name, "bucket": BUCKET, "size": str((self.root / name).stat().st_size), "generation": "1", **when}

    def _send(self, name: str) -> None:
        content = (self.root / name).read_bytes()
        if "Range" not in self.headers:
            self._answer(200, content)
            return
        begin, end = self.headers["Range"].split("=")[1].split("-")
        part = content[int(begin) : int(end or len(content)) + 1]
        self._answer(206, part, {"Content-Range": f"bytes {begin}-{int(begin) + len(part) - 1}/{len(content)}"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "x-goog-generation": "1", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def store(tmp_path) -> Iterator[str]:
    """Address of a server of the files in `tmp_path`."""
    handler = type("Here", (Store,), {"root": tmp_path})
    server = Server(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # the client hangs up when it has seen enough
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_model_is_loaded_from_a_bucket(store, tmp_path):
    """Weights, config and tokenizer are those of the local directory."""
    pytest.importorskip("gcsfs", reason="reading gs:// takes gcsfs")
    convert(mini_directory(), tmp_path / "model", progress=False)
    environment = {"STORAGE_EMULATOR_HOST": store, "TENSORSTORE_GCS_HTTP_URL": store, "TENSORSTORE_GCS_HTTP_VERSION": "1.1"}
    environment |= {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPARE, f"gs://{BUCKET}/model", tmp_path / "model"]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "text.layers.1.feed_forward.experts.gate" in run.stdout


@pytest.mark.parametrize("command", ["convert", "export"])
def test_nothing_is_written_to_a_bucket(command, tmp_path):
    """What Orbax could do and we do not is said, not done in a folder named `gs:`."""
    from maverick_jax.convert import export

    make = {"convert": convert, "export": export}[command]
    with pytest.raises(UserError, match=r"gs://bucket/model is no directory of a disk"):
        make(mini_directory(), "gs://bucket/model", progress=False)
    assert not Path("gs:").exists()


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        ("http://127.0.0.1:9", r"127\.0\.0\.1 cannot be reached \(Connection refused\)"),
        ("http://nowhere.invalid", r"nowhere\.invalid cannot be reached \("),
    ],
    ids=["refuses", "no address"],
)
def test_a_store_that_cannot_be_reached_is_said_before_its_client_is_asked(monkeypatch, server, reason):
    """Which tries for most of a minute, and logs a hundred lines."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    monkeypatch.setattr(remote, "_copy", lambda *_: pytest.fail("asked the client"))
    with pytest.raises(
        UserError, match=rf"^gs://{BUCKET}/model cannot be read, for {reason}.*: check the network, or give a directory here\.$"
    ):
        remote.fetch(f"gs://{BUCKET}/model")


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, r"Anonymous caller.*: log in with `gcloud auth application-default login`"),
        (403, r"Forbidden.*: log in with `gcloud auth application-default login`"),
        (404, r"is not a finished model directory: there is no such bucket or folder\."),
    ],
)
def test_what_a_store_answers_is_one_line(monkeypatch, capfd, status, reason):
    """No right to read, or nothing there; the client's traceback stays in its log."""
    gcsfs = pytest.importorskip("gcsfs", reason="reading gs:// takes gcsfs")
    gcsfs.GCSFileSystem.clear_instance_cache()
    body = json.dumps({"error": {"code": status, "message": "Anonymous caller does not have storage.objects.get access"}}).encode()
    handler = type("Refusing", (Store,), {"do_GET": lambda self: self._answer(status, body)})
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    try:
        with pytest.raises(UserError, match=reason):
            remote.fetch(f"gs://{BUCKET}/status-{status}")
    finally:
        server.shutdown()
        server.server_close()
        gcsfs.GCSFileSystem.clear_instance_cache()
    assert capfd.readouterr().err == ""


def test_other_stores_are_refused():
    with pytest.raises(UserError, match=r"s3://bucket/model: of object stores only gs:// is supported"):
        resolve("s3://bucket/model")
