"""Clients that people use, as they are released, against our server: each does what its users do (`make clients`)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="uvicorn, of the extra `server`, is not installed")

import maverick_jax as mj
from maverick_jax.serving.http.app import Settings
from maverick_jax.serving.http.server import Server, bound
from maverick_jax.serving.http.service import Service
from oracle.scripted_engine import ScriptedEngine

HERE = Path(__file__).parent
PYTHON = os.environ.get("MAVERICK_CLIENTS")  # the interpreter of an environment that has them
NODE = os.environ.get("MAVERICK_NODE", "")  # the folder of those of npm
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(PYTHON is None, reason="MAVERICK_CLIENTS names no Python that has the clients: make clients"),
]


def answer(prompt: str) -> str:
    """Calls a tool when it is asked about the weather, and tells what the tool gave."""
    last = prompt.rpartition("<|header_start|>assistant")[0].rpartition("<|header_start|>")[2]
    if last.startswith("tool"):
        return "It is cold in Oslo."
    return '[weather(city="Oslo")]' if "weather" in last else "Hello from Maverick."


@pytest.fixture(scope="module")
def urls():
    """Of a server that says what a script says, and of one of the mini model."""
    engine = mj.Engine(mj.load(), slots=2, max_length=1024)
    with (
        engine,
        Server(Service(ScriptedEngine(answer), ["mini"]), Settings(), bound("127.0.0.1", 0)) as scripted,
        Server(Service(engine, ["mini"]), Settings(), bound("127.0.0.1", 0)) as mini,
    ):
        yield scripted.url, mini.url


@pytest.mark.parametrize("script", sorted(HERE.glob("by_*")), ids=lambda script: script.stem.removeprefix("by_"))
def test_a_client(script, urls, tmp_path):
    """It ends well; what it says is shown if not. It may talk to nobody else."""
    runner = Path(PYTHON or "").absolute()
    if script.suffix == ".mjs":
        runner = shutil.which("node")
        if runner is None or not Path(NODE, "node_modules").is_dir():
            pytest.skip("node is not installed, or MAVERICK_NODE names no folder with the clients of npm: make clients")
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "MAVERICK_NODE") if name in os.environ}
    environment = keep | {"OPENAI_API_KEY": "none", "NO_PROXY": "127.0.0.1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([runner, script, *urls], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
