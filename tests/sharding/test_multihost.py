"""Several processes, real ones on this machine over gloo: they compute the same as one, and start and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from maverick_jax.assets import digits, mini_directory
from maverick_jax.convert import convert
from maverick_jax.errors import UserError
from maverick_jax.sharding import multihost, roll_call
from maverick_jax.sharding.cluster import Cluster
from processes import HARD_LIMIT_S, LAUNCHERS, MAVERICK, free_port, half_of_the_mini_model

GENERATE = (*MAVERICK, "generate", "What is 3 + 4?")
IN_A_COLLECTIVE = """
import os, sys, time, numpy as np
from jax.experimental import multihost_utils
from maverick_jax.sharding import multihost
multihost.initialize()
multihost_utils.process_allgather(np.zeros(1))
print("ready", flush=True)
if os.environ["JAX_PROCESS_ID"] == sys.argv[1]:
    if sys.argv[2] == "raise":
        raise RuntimeError("no luck")
    time.sleep(600)
multihost_utils.process_allgather(np.zeros(1))
"""
LOAD = """
import jax, numpy as np
from flax import nnx
import maverick_jax as mj
from maverick_jax.sharding import multihost
multihost.initialize()
mesh = mj.make_mesh(data=2, expert=2, tensor=2)
assert [{d.process_index for d in row.flat} for row in mesh.devices] == [{0}, {1}], mesh.devices
files, orbax = (dict(nnx.to_flat_state(nnx.state(mj.load(path, mesh=mesh)))) for path in (None, "model"))
for path, leaf in files.items():
    for a, b in zip(leaf[...].addressable_shards, orbax[path][...].addressable_shards, strict=True):
        assert a.device.process_index == jax.process_index() and np.array_equal(a.data, b.data), path
gate = files["text", "layers", 1, "feed_forward", "experts", "gate"][...]
assert len(gate.addressable_shards) == 4 and gate.addressable_shards[0].data.shape == (64, 64, 16), gate.sharding
alone = mj.load()  # without a mesh each process has a model of its own
assert alone.text.norm[...].devices() == {jax.local_devices()[0]}
"""
TALK = """
import sys
from maverick_jax.cli.main import main
options = ["-m", "half", "--mesh", "data=2,expert=2,tensor=2", "--max-new-tokens", "6", "--json"]
assert main(["generate", "-", *options]) == 0
sys.stdin = open("chat")
sys.exit(main(["chat", *options]))
"""


def test_two_processes_say_what_one_says(start, tmp_path):
    """Same tokens on the same mesh, by both commands; only process 0 reads the prompt and the chat, opens pictures and prints."""
    half_of_the_mini_model(tmp_path / "half")
    digits.picture(digits.held_out()[0][0]).save(tmp_path / "left.png")
    (tmp_path / "chat").write_text("/image left.png\n/image absent.png\n/reset\nWhat is 3 + 4?\n")
    answers = []
    for count in (2, 1):
        flags = f"--xla_force_host_platform_device_count={8 // count}"
        run = start([("-c", TALK)] * count, stdin="What is 3 + 4?", XLA_FLAGS=flags)
        assert run.statuses() == [0] * count, run.err(0)
        answers.append([json.loads(line) for line in run.out(0).splitlines()])
        attached, refused = run.err(0).splitlines()
        assert attached.startswith("left.png: 8 x 8 pixels, 1 tile")
        assert "absent.png" in refused
        if count == 2:
            assert run.out(1) + run.err(1) == ""
    assert [len(words) for words in answers] == [2, 2]
    for two, one in zip(*answers, strict=True):
        assert two["text"] == one["text"] != ""
        assert (two["new_tokens"], two["cached_tokens"]) == (one["new_tokens"], 0)


def test_every_process_loads_its_own_shards(start, tmp_path):
    """From safetensors and from Orbax the same, data across the processes, experts inside; four devices each on request."""
    convert(mini_directory(), tmp_path / "model", progress=False)
    run = start([("-c", LOAD)] * 2)
    assert run.statuses() == [0, 0], run.err(0) + run.err(1)


@pytest.mark.parametrize("victim, sign", [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGTERM)])
def test_a_killed_process_ends_the_others(start, victim, sign):
    """The other waits in a collective that will never end; jax alone would notice after minutes."""
    run = start([("-c", IN_A_COLLECTIVE, victim, "sleep")] * 2)
    for process in (0, 1):
        run.wait_for("ready", process)
    killed = time.monotonic()
    run.processes[victim].send_signal(sign)
    statuses = run.statuses(60)
    assert time.monotonic() - killed < 60
    assert statuses[victim] == -sign
    # Of process 0's death jax's own coordination service may report too, around our line.
    assert f"maverick: process {1 - victim} of 2: process {victim} is gone without a word" in run.err(1 - victim)
    if victim == 1:
        assert statuses[0] == roll_call.LOST
        run.one_line(0)


def test_an_exception_in_one_process_ends_the_others(start):
    """A script of the user's own: the others say whose error it was, and nobody waits for the one that is gone."""
    run = start([("-c", IN_A_COLLECTIVE, 1, "raise")] * 2)
    assert run.statuses(60) == [roll_call.LOST, roll_call.LOST]
    assert run.one_line(0) == "maverick: process 0 of 2: process 1 failed: no luck"
    assert "RuntimeError: no luck" in run.err(1)


def broken_copy(tmp_path: Path, what: str) -> Path:
    copy = tmp_path / what
    shutil.copytree(mini_directory(), copy)
    if what == "other-config":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": 3}))
    elif what == "other-weights":
        data = bytearray((copy / "model.safetensors").read_bytes())
        data[len(data) // 2] ^= 1
        (copy / "model.safetensors").write_bytes(data)
    return copy


@pytest.mark.parametrize(
    "options, words",
    [
        (["-m", "other-config"], ["config.json is", "on process 0", "on process 1"]),
        (["-m", "other-weights"], ["the checkpoint is", "on process 0", "on process 1"]),
        (["--mesh", "expert=4", "--seed", "7"], ["--mesh is None on process 0, 'expert=4' on process 1", "--seed is 0 on process 0, 7 on"]),
    ],
    ids=["config", "weights", "arguments"],
)
def test_processes_that_differ_are_told_apart(start, tmp_path, options, words):
    """They would wait for each other for ever, or compute nonsense together."""
    if options[0] == "-m":
        broken_copy(tmp_path, options[1])
    run = start([GENERATE, (*GENERATE, *options)])
    assert run.statuses() == [2, 2]
    for process in (0, 1):
        line = run.one_line(process)
        assert all(word in line for word in ["the processes of this run differ", *words]), line
    assert run.out(0) == ""


def test_a_mistake_of_one_process_is_told_to_all(start):
    """A directory that one host lacks: the others must not wait."""
    run = start([GENERATE, (*GENERATE, "-m", "nowhere")])
    assert run.statuses() == [2, 2]
    mistake = "nowhere does not exist: give the directory that holds config.json and the weights."
    assert run.one_line(0) == f"maverick: process 0 of 2: process 1 failed: {mistake}"
    assert run.one_line(1) == f"maverick: {mistake}"


def test_more_processes_announced_than_arrive(start):
    """All that did arrive say which did not, and end with status 2."""
    run = start([GENERATE] * 2, announced=4, MAVERICK_START_LIMIT="3")
    assert run.statuses() == [2, 2]
    for process in (0, 1):
        assert "processes 2, 3 of 4 did not arrive at 127.0.0.1:" in run.one_line(process)


@pytest.mark.parametrize("address", ["nowhere.invalid:1234", "192.0.2.1:1234"])
def test_a_wrong_address_says_so(start, address):
    """Neither process can reach it: both name it, before jax aborts the process by its own time-out."""
    run = start([GENERATE] * 2, JAX_COORDINATOR_ADDRESS=address, MAVERICK_START_LIMIT="2")
    assert run.statuses() == [2, 2]
    assert f"{address} (the JAX_* variables) does not lead to process 0" in run.one_line(0)
    assert f"process 1 found no process 0 at {address}" in run.one_line(1)


# The meeting itself, in threads: what takes no real processes.


def meet(count: int, members: Sequence[tuple[int, int]], *, limit_s: float = 3) -> dict[int, object]:
    """(process, announced count) of each member -> the team that it found, or its error, by place among the members."""
    port, results = free_port(), {}

    def join(place, process, announced):
        try:
            results[place] = roll_call.meet(Cluster(f"127.0.0.1:{port}", announced, process, "a test"), limit_s)
        except UserError as error:
            results[place] = str(error)

    threads = [threading.Thread(target=join, args=(place, *member)) for place, member in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HARD_LIMIT_S)
    return results


def test_values_come_from_everyone_in_order():
    """Every process sees all values by process, whoever came first; what several rounds exchange does not mix."""
    teams = meet(4, [(process, 4) for process in (2, 0, 3, 1)])
    seen = {}
    threads = [
        threading.Thread(target=lambda t=team: seen.update({t.process: [t.exchange([t.process, n]) for n in range(3)]}))
        for team in teams.values()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HARD_LIMIT_S)
    assert seen == {process: [[[p, n] for p in range(4)] for n in range(3)] for process in range(4)}
    for team in teams.values():
        team.finish()


def test_processes_that_disagree_about_their_number():
    """One is told of three, the other of two."""
    results = meet(2, [(0, 2), (1, 3)])
    assert all("process 1 was told of 3 processes, process 0 of 2" in text for text in results.values())


def test_two_with_the_same_number():
    """Without this check one would wait for ever."""
    results = meet(3, [(0, 3), (1, 3), (1, 3)])
    assert all("two processes say that they are process 1" in text for text in results.values())


def test_strangers_at_the_door():
    """A port scanner neither ends the run nor counts as a process."""
    port = free_port()
    cluster = Cluster(f"127.0.0.1:{port}", 2, 0, "a test")
    found = {}
    first = threading.Thread(target=lambda: found.update(team=roll_call.meet(cluster, 20)))
    first.start()
    for greeting in (b"", b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b'{"hello": "somebody else"}\n'):
        with roll_call._connect(("127.0.0.1", port), 5) as stranger:
            stranger.sendall(greeting)
    second = roll_call.meet(Cluster(f"127.0.0.1:{port}", 2, 1, "a test"), 20)
    first.join(HARD_LIMIT_S)
    for team in (found["team"], second):
        team.finish()


def test_something_else_answers_at_the_address():
    """The address of a web server, or of a run that started without this process."""

    def greet():
        with server.accept()[0] as caller:
            caller.sendall(b"220 mail.example\r\n")
            caller.recv(1000)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(UserError, match=r"what answers at 127\.0\.0\.1:\d+ \(a test\) is not process 0 of this run"):
            roll_call.meet(Cluster(f"127.0.0.1:{server.getsockname()[1]}", 2, 1, "a test"), 5)


def test_a_port_in_use():
    """Another job on process 0's machine."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"cannot listen on port \d+ \(Address already in use\): another job uses it"):
            roll_call.meet(Cluster(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0, "a test"), 5)


def test_processes_in_words():
    """A thousand missing processes fit one line."""
    assert roll_call.processes([3]) == "process 3"
    assert roll_call.processes([9, 1, 2, 5, 6, 7, 8]) == "processes 1, 2, 5-9"


def test_alone_everything_is_free(monkeypatch):
    """One process without a launcher: nothing is started, and the functions for many answer for one."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(roll_call, "meet", None)
    with multihost.joined():
        assert multihost.is_first()
        assert multihost.process_count() == 1
        assert multihost.exchange("a") == ["a"]
        assert list(multihost.from_first(iter("ab"))) == ["a", "b"]
        multihost.check_same({"anything": "goes"})


@pytest.mark.parametrize("text", ["long", "nan", "inf", "-5", "0", "1e400"])
def test_a_start_limit_that_is_no_number(monkeypatch, text):
    """The variable is named. Without this some of them would wait for ever."""
    monkeypatch.setenv("MAVERICK_START_LIMIT", text)
    with pytest.raises(UserError, match=f"MAVERICK_START_LIMIT is '{text}', not a number of seconds above 0"):
        multihost._start_limit()
    with pytest.raises(UserError, match=f"limit_s is '{text}', not a number"):
        multihost._start_limit(text)
    assert multihost._start_limit(7) == 7
