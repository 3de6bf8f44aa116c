"""Strangers at the door of process 0, and at the address where process 0 should be. All processes and sockets are real."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
from pathlib import Path

import pytest

from maverick_jax.errors import UserError
from maverick_jax.sharding import connection, greeting, roll_call
from maverick_jax.sharding.connection import Connection
from processes import HARD_LIMIT_S, MEET, TOKEN, free_port, soon

ROOT = Path(__file__).parents[2]
JOIN = ("-c", MEET, ROOT, 60)


def call(port: int) -> socket.socket:
    """A connection to process 0, once it listens."""
    connected = roll_call._connect(("127.0.0.1", port), HARD_LIMIT_S)
    assert isinstance(connected, socket.socket), connected
    connected.settimeout(HARD_LIMIT_S)
    return connected


def say(*lines: bytes):
    """An attack: each line on a connection of its own, then all of them on one; nobody waits for an answer."""

    def attack(port: int) -> list[socket.socket]:
        callers = [call(port) for _ in (*lines, None)]
        for caller, words in zip(callers, [*lines, b"\n".join(lines)], strict=True):
            with contextlib.suppress(OSError):  # hung up in the middle
                caller.sendall(words + b"\n")
        return callers

    return attack


def message(**fields) -> bytes:
    return json.dumps(fields).encode()


def hello(**fields) -> bytes:
    return message(hello=greeting.PROTOCOL, nonce="0" * 32, **fields)


def impostor(process, count):
    """Speaks the protocol to its end, with a guess for the token."""

    def attack(port: int) -> list[socket.socket]:
        caller = Connection(call(port))
        caller.send(hello=greeting.PROTOCOL, nonce="0" * 32)
        nonce = caller.receive()["nonce"]
        proof = greeting._proof("a guess", "caller", "0" * 32, nonce, process, count)
        caller.send(process=process, count=count, proof=proof)
        with pytest.raises(connection.Gone):
            caller.receive()
        return [caller.socket]

    return attack


def echo(port: int) -> list[socket.socket]:
    """Gives process 0 its own proof back."""
    caller = Connection(call(port))
    caller.send(hello=greeting.PROTOCOL, nonce="0" * 32)
    answer = caller.receive()
    caller.send(process=1, count=2, **answer)
    with pytest.raises(connection.Gone):
        caller.receive()
    return [caller.socket]


def endless_line(port: int) -> list[socket.socket]:
    """Process 0 would read until its memory is full; what it does not read fills the buffers of the system, a few megabytes."""
    caller = call(port)
    with pytest.raises(OSError, match=r"(?i)reset|pipe"):
        caller.sendall(bytes(2**26))
    return [caller]


def drip(port: int) -> list[socket.socket]:
    """A byte now and then, for as long as the run lasts."""
    caller = call(port)

    def send():
        with contextlib.suppress(OSError):
            for _ in itertools.count():
                caller.sendall(b" ")
                stop.wait(0.1)

    stop = threading.Event()
    threading.Thread(target=send, daemon=True).start()
    return [caller]


def crowd(port: int) -> list[socket.socket]:
    """More than can be heard at once, none of whom says a word."""
    return [call(port) for _ in range(200)]


ATTACKS = {
    "no fields": say(message(hello="maverick-jax 1"), message(hello=greeting.PROTOCOL), hello(), b"{}", b"null", b"[1]", b'"x"', b""),
    "process 7 of 2": say(message(hello="maverick-jax 1", process=7, count=2), hello(process=7, count=2)),
    "another count": say(message(hello="maverick-jax 1", process=1, count=3), hello(process=1, count=3)),
    "wrong types": say(
        *(hello(process=process, count=2) for process in ("1", True, 1.5, None, [1], {}, -1, 2**70)),
        *(message(hello=greeting.PROTOCOL, nonce=nonce) for nonce in (None, 7, "", "é" * 32, "\udcff", "0" * 31, "0" * 33, ["0" * 32])),
        *(message(hello=word) for word in (None, True, 1, [greeting.PROTOCOL], {"hello": greeting.PROTOCOL})),
    ),
    "no JSON": say(
        b"GET / HTTP/1.0\r\n\r", b"\x16\x03\x01\x00\xff", b"\xff\xfe{", b'{"hello": NaN}', b"1" * 5000, b"[" * 60_000, b'{"a":' * 9000
    ),
    "process 1's place": impostor(1, 2),
    "process 0 again": impostor(0, 2),
    "own proof": echo,
    "end": say(message(end="over", status=0), message(end="over", status=2), message(finished=True), message(value=1), message(start=1)),
    "endless line": endless_line,
    "byte by byte": drip,
    "crowd": crowd,
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_run_does_not_notice_strangers(start, tmp_path, attack):
    """They neither end it nor take a place nor keep anybody waiting, while processes gather and after they have met."""
    port = free_port()
    run = start([JOIN] * 2, MAVERICK_RUN_TOKEN=TOKEN, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}")
    with contextlib.ExitStack() as stack:
        for done in ("come", "go"):
            for caller in attack(port):
                stack.enter_context(caller)
            (tmp_path / done).touch()
            if done == "come":
                run.wait_for("met", 0)
        assert run.statuses() == [0, 0], run.err(0) + run.err(1)
    for process in (0, 1):
        assert run.out(process) == "met\n[0, 1]\n"
        assert run.err(process) == ""


def join_by_hand(port: int) -> Connection:
    """As process 1 of 2, with the token."""
    own = Connection(call(port))
    try:
        greeting.introduce(own, TOKEN, 1, 2, deadline=soon())
    except UserError:
        own.close()
        raise
    return own


@pytest.mark.parametrize(
    "words",
    [
        message(end="all is well", status=0),
        message(end="all is well", status=True),
        message(end="all is well"),
        message(end=None, status=2),
        message(finished=1),
        message(value=1) + b"\n" + message(value=2),
        message(),
        b"{",
        b"[" * 60_000,
    ],
    ids=lambda words: words[:40].decode(),
)
def test_a_member_cannot_end_the_run_in_order(start, tmp_path, words):
    """Nor with a status of its own, nor with a value out of turn, nor with what is no message: process 0 says so and fails."""
    port = free_port()
    run = start([JOIN], announced=2, MAVERICK_RUN_TOKEN=TOKEN, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}")
    with contextlib.closing(join_by_hand(port)) as member:
        assert member.receive().keys() == {"start"}
        member.socket.sendall(words + b"\n")
        assert run.statuses() == [roll_call.LOST]
    assert "maverick: process 0 of 2: process 1 sent " in run.one_line(0)


def test_an_error_of_a_member_keeps_its_status(start):
    """What a process reports in good order is passed on as it is, on one line whatever its text."""
    port = free_port()
    run = start([JOIN], announced=2, MAVERICK_RUN_TOKEN=TOKEN, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}")
    with contextlib.closing(join_by_hand(port)) as member:
        assert member.receive().keys() == {"start"}
        member.send(end="process 1 failed: no\nluck \udcff", status=roll_call.MISTAKE)
        assert run.statuses() == [roll_call.MISTAKE]
    assert run.one_line(0) == "maverick: process 0 of 2: process 1 failed: no luck \\udcff"


def test_who_comes_late_is_told(start, tmp_path):
    """Process 1 started twice: the run goes on, and the second one ends with the reason."""
    port = free_port()
    run = start([JOIN] * 2, MAVERICK_RUN_TOKEN=TOKEN, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}")
    (tmp_path / "come").touch()
    run.wait_for("met", 0)
    run.wait_for("met", 1)
    with pytest.raises(UserError, match=rf"all 2 processes of the run at 127\.0\.0\.1:{port} are there: this one is too many"):
        join_by_hand(port)
    (tmp_path / "go").touch()
    assert run.statuses() == [0, 0]


def slurm(job: int) -> dict[str, str]:
    """Two tasks of a job on one machine."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "2",
        "JAX_COORDINATOR_ADDRESS": "",
        "JAX_NUM_PROCESSES": "",
        "JAX_PROCESS_ID": "",
    }


def free_slurm_port() -> int:
    for port in range(61440, 65536):
        with contextlib.suppress(OSError), socket.create_server(("localhost", port)):
            return port
    raise AssertionError("no port is free")


def test_two_jobs_of_one_user_on_one_port(start, tmp_path):
    """SLURM's numbers lead both to one port of a machine they share: the second job ends with the reason, the first never knows."""
    port = free_slurm_port()
    jobs = [slurm(port - 61440 + 4096 * n) for n in (1, 2)]
    first = start([(*JOIN,)] * 2, folder=tmp_path / "first", numbered="SLURM_PROCID", **jobs[0])
    call(port).close()
    second = start([(*JOIN,)] * 2, folder=tmp_path / "second", numbered="SLURM_PROCID", **jobs[1])
    (tmp_path / "second" / "come").touch()
    assert second.statuses() == [2, 2]
    assert f"process 0 cannot listen on port {port} (Address already in use): another job uses it" in second.one_line(0)
    assert f"process 0 at localhost:{port} (SLURM) has another token than process 1: it belongs to another run" in second.one_line(1)
    for done in ("come", "go"):
        (tmp_path / "first" / done).touch()
    assert first.statuses() == [0, 0], first.err(0) + first.err(1)
    assert [first.out(process) for process in (0, 1)] == ["met\n[0, 1]\n"] * 2
