"""The door of process 0: limits of time and number, and what it takes to be let in."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time

import pytest

from maverick_jax.sharding import door, greeting, roll_call
from maverick_jax.sharding.connection import Connection, Gone
from maverick_jax.sharding.door import Door
from processes import HARD_LIMIT_S, TOKEN, member, soon


def knock(at: Door) -> Connection:
    return Connection(roll_call._connect(at.cluster.host_and_port, HARD_LIMIT_S))


def drip(to: Connection, tired: threading.Event) -> None:
    """Ten times as long as the limit of the test."""
    with contextlib.suppress(OSError):
        for _ in range(250):
            to.socket.sendall(b" ")
            time.sleep(0.02)
        tired.set()
        to.hang_up()


@pytest.mark.parametrize("first_line", [False, True], ids=["hello", "proof"])
def test_a_byte_now_and_then_does_not_pass_the_deadline(gathering, monkeypatch, first_line):
    """The limit is for the whole greeting; a limit for each byte, or for each line, would never end it."""
    monkeypatch.setattr(greeting, "GREETING_S", 0.5)
    tired = threading.Event()
    with contextlib.closing(knock(gathering)) as slow:
        if first_line:
            slow.send(hello=greeting.PROTOCOL, nonce="0" * 32)
            slow.receive()
        thread = threading.Thread(target=drip, args=(slow, tired))
        thread.start()
        with pytest.raises(Gone):
            slow.receive()
        assert not tired.is_set()
    thread.join()


def test_only_so_many_are_heard_at_once(gathering, monkeypatch):
    """The one who has waited longest goes; the others, and process 1, are not touched."""
    monkeypatch.setattr(door, "STRANGERS", 3)
    with contextlib.ExitStack() as stack:
        callers = [stack.enter_context(contextlib.closing(knock(gathering))) for _ in range(20)]
        for caller in callers[:16]:  # as many as are too many: one process is missing, three may be strangers
            with pytest.raises(Gone):
                caller.receive()
        assert len(gathering._heard) <= 4
        last = callers[-1]
        greeting.introduce(last, TOKEN, 1, 2, soon())
        gathering.wait(HARD_LIMIT_S)
        assert gathering.missing == []
        assert gathering.arrived.keys() == {1}


def test_a_slow_caller_delays_nobody(gathering, monkeypatch):
    """Heard one after the other, process 1 would wait for as long as strangers take their time."""
    monkeypatch.setattr(greeting, "GREETING_S", HARD_LIMIT_S)
    with contextlib.closing(knock(gathering)), contextlib.closing(knock(gathering)) as caller:
        greeting.introduce(caller, TOKEN, 1, 2, deadline=time.monotonic() + HARD_LIMIT_S / 4)


class Busy(socket.socket):
    """A listener whose process has as many files open as it may, for a while."""

    failures = 2

    def accept(self) -> tuple[socket.socket, object]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_the_door_is_answered_when_files_run_out(open_door):
    """Strangers may use them up; the door must still be there afterwards."""
    own = member()
    at = open_door(own, Busy(fileno=roll_call._listen(own, 1).detach()))
    with contextlib.closing(knock(at)) as caller:
        greeting.introduce(caller, TOKEN, 1, 2, soon())
        at.wait(HARD_LIMIT_S)
        assert at.missing == []


def test_a_token_never_travels(gathering):
    """Neither as it is nor in what is the same twice: who listens learns nothing that lets him in."""
    heard = []
    for _ in range(2):
        with contextlib.closing(knock(gathering)) as caller:
            caller.send(hello=greeting.PROTOCOL, nonce="0" * 32)
            heard.append(caller.receive())
    assert heard[0].keys() == {"nonce", "proof"}
    assert not set(heard[0].values()) & set(heard[1].values())
    assert TOKEN not in str(heard)
    assert TOKEN not in repr(gathering.cluster)


def test_a_proof_is_good_once(gathering):
    """What process 1 said yesterday, or says now on another connection, does not let a stranger in."""
    with contextlib.closing(knock(gathering)) as caller, contextlib.closing(knock(gathering)) as thief:
        for one in (caller, thief):
            one.send(hello=greeting.PROTOCOL, nonce="0" * 32)
        nonces = [one.receive()["nonce"] for one in (caller, thief)]
        proof = greeting._proof(TOKEN, "caller", "0" * 32, nonces[0], 1, 2)
        thief.send(process=1, count=2, proof=proof)
        with pytest.raises(Gone):
            thief.receive()
        assert gathering.missing == [1]
        caller.send(process=1, count=2, proof=proof)
        gathering.wait(HARD_LIMIT_S)
        assert gathering.missing == []


def test_a_proof_is_for_one_number(gathering):
    """Process 1 cannot say that it is process 2."""
    with contextlib.closing(knock(gathering)) as caller:
        caller.send(hello=greeting.PROTOCOL, nonce="0" * 32)
        caller.send(process=0, count=2, proof=greeting._proof(TOKEN, "caller", "0" * 32, caller.receive()["nonce"], 1, 2))
        with pytest.raises(Gone):
            caller.receive()
    assert not gathering.problem


@pytest.mark.parametrize(
    "process, count", [("1", 2), (True, 2), (1.0, 2), (None, 2), (1, "2"), (1, None), (2, 2), (-1, 2), (1, 2**70), ([1], 2)]
)
def test_numbers_of_processes_are_numbers(gathering, process, count):
    """Even from somebody who knows the token: what is no number of a process must not get among them."""
    with contextlib.closing(knock(gathering)) as caller:
        caller.send(hello=greeting.PROTOCOL, nonce="0" * 32)
        proof = greeting._proof(TOKEN, "caller", "0" * 32, caller.receive()["nonce"], process, count)
        caller.send(process=process, count=count, proof=proof)
        with pytest.raises(Gone):
            caller.receive()
    assert gathering.missing == [1]
    assert not gathering.problem


@pytest.mark.parametrize("given", [None, 7, "", "é", "\udcff", ["0"], True])
def test_proofs_of_any_kind_are_compared(given):
    """`compare_digest` itself raises for what is no ASCII text."""
    assert not greeting._equal("0" * 64, given)


def test_proofs_are_compared_in_constant_time(monkeypatch):
    """How long `==` takes tells how many characters are right."""
    asked = []
    monkeypatch.setattr(greeting.hmac, "compare_digest", lambda *pair: asked.append(pair) or True)
    assert greeting._equal("a", "b")
    assert asked == [(b"a", b"b")]


@pytest.mark.parametrize("token", ["", "é \udcff", "x" * 10_000])
def test_tokens_of_any_kind(open_door, token):
    """None at all, bytes that are no text, a long one: who has the same gets in."""
    at = open_door(member(token=token))
    with contextlib.closing(knock(at)) as caller:
        greeting.introduce(caller, token, 1, 2, soon())
        at.wait(HARD_LIMIT_S)
        assert at.missing == []
