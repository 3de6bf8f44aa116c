"""Runs of several processes, real ones on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from maverick_jax.assets import mini_directory
from maverick_jax.sharding.cluster import Cluster

TOKEN = "only the processes of this run know it"
HARD_LIMIT_S = 120  # of one run; a run that works takes a quarter of it
LAUNCHERS = ("JAX_", "XLA_", "SLURM_", "OMPI_", "PMI", "TPU_", "MEGASCALE_", "MAVERICK_", "JOB_COMPLETION")
# Joins the others and exchanges numbers, when the files `come` and `go` let it. What meets needs no jax, whose import takes a second.
MEET = """
import os, pathlib, sys, time, types
package = sys.modules["maverick_jax.sharding"] = types.ModuleType("maverick_jax.sharding")
package.__path__ = [str(pathlib.Path(sys.argv[1], "maverick_jax", "sharding"))]
from maverick_jax.errors import UserError
from maverick_jax.sharding import cluster, roll_call
here = cluster.find_cluster(os.environ)
def wait(name):
    while not os.path.exists(name):
        time.sleep(0.02)
if here.process:
    wait("come")
try:
    team = roll_call.meet(here, float(sys.argv[2]))
except UserError as error:
    print(f"maverick: {error}", file=sys.stderr)
    sys.exit(2)
print("met", flush=True)
wait("go")
print(team.exchange(here.process), flush=True)
team.finish()
assert "jax" not in sys.modules
"""
MAVERICK = ("-m", "maverick_jax")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def soon() -> float:
    """A deadline that a working program never meets."""
    return time.monotonic() + HARD_LIMIT_S


def member(process: int = 0, *, count: int = 2, host: str = "127.0.0.1", port: int | None = None, **more) -> Cluster:
    """A process of a run with a token, at a port of its own unless there is one."""
    return Cluster(f"{host}:{port or free_port()}", count, process, "a test", **({"token": TOKEN} | more))


class Run:
    """Processes of one run, in `folder`, with four simulated devices each unless there is one."""

    def __init__(
        self,
        folder: Path,
        commands: Sequence[Sequence[object]],
        *,
        announced: int | None = None,
        numbered: str = "JAX_PROCESS_ID",
        stdin: str = "",
        **environment: str,
    ):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        clean |= {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}
        count = announced or len(commands)
        self.folder, self.processes = folder, []
        folder.mkdir(exist_ok=True)
        for process, command in enumerate(commands):
            variables = clean | {"JAX_NUM_PROCESSES": str(count)} | environment | {numbered: str(process)}
            with open(folder / f"out{process}", "wb") as out, open(folder / f"err{process}", "wb") as err:
                words = [sys.executable, *map(str, command)]
                self.processes.append(subprocess.Popen(words, cwd=folder, env=variables, stdin=subprocess.PIPE, stdout=out, stderr=err))
            with self.processes[-1].stdin as pipe:
                pipe.write((stdin if process == 0 else "").encode())

    def out(self, process: int) -> str:
        return (self.folder / f"out{process}").read_text()

    def err(self, process: int) -> str:
        return (self.folder / f"err{process}").read_text()

    def statuses(self, limit_s: float = HARD_LIMIT_S) -> list[int]:
        """Exit statuses once all have ended."""
        end = time.monotonic() + limit_s
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def wait_for(self, word: str, process: int) -> None:
        end = time.monotonic() + HARD_LIMIT_S
        while word not in self.out(process):
            assert time.monotonic() < end, self.err(process)
            assert self.processes[process].poll() is None, self.err(process)
            time.sleep(0.05)

    def one_line(self, process: int) -> str:
        """All that a process said to standard error."""
        lines = self.err(process).splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("maverick: ")
        return lines[0]


def half_of_the_mini_model(directory: Path) -> None:
    """Its first four layers of eight: every kind of layer, in half the time to compile."""
    shutil.copytree(mini_directory(), directory)
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not re.search(r"language_model.*layers\.[4-7]", name)}
    save_file(kept, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 4, "moe_layers": [1, 3], "no_rope_layers": [1, 1, 1, 0]}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Run]]:
    """`start(commands)`: a `Run`, in the test's folder or another, whose processes do not outlive the test."""
    runs: list[Run] = []

    def started(*arguments, folder: Path = tmp_path, **options) -> Run:
        runs.append(Run(folder, *arguments, **options))
        return runs[-1]

    yield started
    for process in (process for run in runs for process in run.processes):
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
