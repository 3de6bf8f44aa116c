"""Requests at random, made by schemathesis of the description that the server gives: each is answered as that says, and none with a 5xx."""

import os
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="uvicorn, of the extra `server`, is not installed")

from maverick_jax.serving.http.app import Settings
from maverick_jax.serving.http.openapi import description
from maverick_jax.serving.http.server import Server, bound
from maverick_jax.serving.http.service import Service
from oracle.scripted_engine import ScriptedEngine

PYTHON = os.environ.get("MAVERICK_CLIENTS")
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(PYTHON is None, reason="MAVERICK_CLIENTS names no Python that has the clients: make clients"),
]
LEFT_OUT = "positive_data_acceptance"  # what a schema cannot say, such as which models there are, is refused with a reason


def test_requests_at_random(tmp_path):
    """All that it checks, over all operations; the server answers as before when it is through."""
    settings = ["--exclude-checks", LEFT_OUT, "--max-examples", "100", "--request-timeout", "30", "--seed", "1", "--no-color"]
    with Server(Service(ScriptedEngine(lambda prompt: "yes"), ["mini"]), Settings(), bound("127.0.0.1", 0)) as server:
        environment = os.environ | {"NO_PROXY": "127.0.0.1"}
        command = [Path(PYTHON or "").absolute().with_name("schemathesis"), "run", f"{server.url}/openapi.json", *settings]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout[-10_000:] + ended.stderr[-2000:]
    operations = sum(len(methods) for methods in description()["paths"].values())
    assert f"Selected: {operations}/{operations}" in ended.stdout
    (cases,) = re.findall(r"(\d+) generated", ended.stdout)
    assert int(cases) > 1000
