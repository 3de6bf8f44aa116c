"""Where process 0 listens, what the others make of who answers there, and how a run ends."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import threading

import pytest

from maverick_jax.errors import UserError
from maverick_jax.sharding import greeting, multihost, roll_call, team
from maverick_jax.sharding.cluster import Cluster
from processes import HARD_LIMIT_S, TOKEN, free_port, member


def meet_as_process_1(answers: list[bytes], **more) -> str:
    """What process 1 says when this answers at its address, one answer per connection, then nobody."""

    def serve():
        for answer in answers:
            with contextlib.suppress(OSError), server.accept()[0] as caller:
                caller.sendall(answer)
                if answer:
                    while caller.recv(1000):
                        pass
        server.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(HARD_LIMIT_S)  # process 1 may give up before it has heard all answers
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UserError) as error:
            roll_call.meet(member(1, port=server.getsockname()[1], **more), 3)
        thread.join()
    return str(error.value)


@pytest.mark.parametrize(
    "answer",
    [
        b"220 mail.example\r\n",
        b"{}\n",
        b"[" * 60_000 + b"\n",
        bytes(2**20),
        b'{"start": 1}\n',
        b'{"end": "over"}\n',
        b'{"nonce": 1, "proof": 1}\n',
    ],
    ids=lambda answer: answer[:30].decode(),
)
def test_what_answers_is_not_process_0(answer):
    """The address of another program: neither its orders nor its endless line are taken."""
    assert "is not process 0 of this run" in meet_as_process_1([answer])


def test_a_stranger_in_the_place_of_process_0():
    """It speaks the protocol and does not know the token: process 1 tells it nothing, not even its number."""
    own = greeting.new_nonce()
    answer = f'{{"nonce": "{own}", "proof": "{greeting._proof("a guess", "door", own, own)}"}}\n'
    text = meet_as_process_1([answer.encode()])
    assert "has another token than process 1" in text
    assert "MAVERICK_RUN_TOKEN" in text


def test_a_proxy_that_hangs_up_is_asked_again():
    """A sidecar takes connections before process 0 is there."""
    assert "found no process 0" in meet_as_process_1([b"", b"", b""])


def test_who_says_nothing_does_not_hold_process_1(monkeypatch):
    """Something that listens and is silent: the limit ends it."""
    monkeypatch.setattr(greeting, "GREETING_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UserError, match="is not process 0 of this run"):
        roll_call.meet(member(1, port=silent.getsockname()[1]), 0.2)


def listens_at(own: Cluster) -> str:
    with roll_call._listen(own, 0.1) as listener:
        return listener.getsockname()[0]


def everywhere() -> str:
    return "::" if socket.has_dualstack_ipv6() else "0.0.0.0"


def test_process_0_listens_at_its_own_address_alone(monkeypatch):
    """Not on all interfaces, unless nothing else would do."""
    assert listens_at(member(host="127.0.0.1")) == "127.0.0.1"
    assert ipaddress.ip_address(listens_at(member(host="localhost"))).is_loopback
    assert listens_at(member(host="192.0.2.1")) == everywhere()  # of a router in front of this machine
    assert listens_at(member(host="192.0.2.1", bind_host="127.0.0.1")) == "127.0.0.1"
    # Debian's name of the machine itself: others find it at its real address.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))])
    assert listens_at(member(host="myself")) == everywhere()


def test_a_bind_address_of_another_machine():
    """The user's own word is not replaced by all interfaces."""
    with pytest.raises(UserError, match=r"JAX_COORDINATOR_BIND_ADDRESS '192\.0\.2\.1' is no address of the machine of process 0"):
        listens_at(member(bind_host="192.0.2.1"))


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="this system has no SO_REUSEPORT")
def test_no_other_process_shares_the_port(gathering):
    """jax's own service may be started twice at one port, and the kernel then gives each the other's processes."""
    with socket.socket() as second:
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="in use"):
            second.bind(gathering.cluster.host_and_port)
    with pytest.raises(UserError, match="another job uses it"):
        roll_call._listen(gathering.cluster, 1)


def test_the_address_leads_to_another_program(gathering):
    """A typing mistake: process 0 would wait for the others until the limit, and they for it."""
    wrong = pytest.raises(UserError, match=r"cannot reach itself there \(another program answers\)")
    with socket.create_server(("127.0.0.1", 0)) as other, wrong:
        roll_call._reach_self(member(port=other.getsockname()[1]), gathering, 0.2)


def test_jax_gets_a_port_of_its_own(teams):
    """At process 0's address, told to all: the roll call's own port stays taken for as long as the run lasts."""
    first, second = teams[0], teams[1]
    assert first.coordinator == second.coordinator == first.bind
    host, _, port = first.coordinator.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) != first._door.cluster.host_and_port[1]
    with pytest.raises(UserError, match="another job uses it"):
        roll_call._listen(first._door.cluster, 1)


def test_the_port_of_jax_can_be_chosen():
    """Where a firewall opens only some; the roll call's own is not given twice, and a taken one is an error."""
    port = free_port()
    assert roll_call._port_for_jax(member(bind_host="127.0.0.1", bind_port=port), "127.0.0.1") == port
    assert roll_call._port_for_jax(member(port=port, bind_host="127.0.0.1", bind_port=port), "127.0.0.1") != port
    with socket.create_server(("127.0.0.1", port)), pytest.raises(UserError, match=rf"cannot listen on port {port} "):
        roll_call._port_for_jax(member(bind_host="127.0.0.1", bind_port=port), "127.0.0.1")


def test_no_way_to_the_service_of_jax():
    """jax would abort the process with a stack trace after the whole start limit."""
    with pytest.raises(UserError, match=r"no way to jax's service at 127\.0\.0\.1:\d+ .*JAX_COORDINATOR_BIND_ADDRESS=HOST:PORT"):
        multihost._wait_for_service(f"127.0.0.1:{free_port()}", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as service:
        multihost._wait_for_service(f"127.0.0.1:{service.getsockname()[1]}", 1)


@pytest.mark.parametrize("token, bind_host, said", [("", "0.0.0.0", True), ("", "127.0.0.1", False), (TOKEN, "0.0.0.0", False)])
def test_a_door_that_stands_open_is_named(capsys, token, bind_host, said):
    """Without a token whoever reaches the port can join: one line says so, unless it can only be somebody on this machine."""
    with pytest.raises(UserError, match="process 1 of 2 did not arrive"):
        roll_call.meet(member(token=token, bind_host=bind_host), 0.1)
    assert ("can join this run: set MAVERICK_RUN_TOKEN" in capsys.readouterr().err) is said


def test_after_an_error_the_port_is_free(capsys):
    """Whoever was there is told, and the next attempt finds the port."""
    own = member(count=3)
    for _ in range(2):
        with pytest.raises(UserError, match=r"processes 1, 2 of 3 did not arrive"):
            roll_call.meet(own, 0.1)


def test_a_process_ends_though_its_message_cannot_be_printed(teams, monkeypatch):
    """A terminal that takes no such character, or none at all: the main thread waits in a collective that nobody will answer."""

    def fails(*_, **__):
        raise UnicodeEncodeError("ascii", "é", 0, 1, "no such character")

    ended = []
    monkeypatch.setattr(team, "print", fails, raising=False)
    monkeypatch.setattr(os, "_exit", ended.append)
    teams[0]._end("é", roll_call.LOST)
    assert ended == [roll_call.LOST]


def test_who_is_sent_away_in_the_middle_of_the_greeting_comes_again(gathering):
    """The door hears too many at once and lets the oldest go: process 1 must not take that for the end of its run."""

    def on_the_way():
        """A proxy that cuts the first connection when process 1 has said its number."""
        for cut in (True, False):
            caller, onward = server.accept()[0], socket.create_connection(gathering.cluster.host_and_port)
            with caller, onward:
                onward.sendall(caller.recv(2**16))
                caller.sendall(onward.recv(2**16))
                words = caller.recv(2**16)
                if not cut:
                    onward.sendall(words)
                    caller.sendall(onward.recv(2**16))
                    caller.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=on_the_way, daemon=True)
        thread.start()
        with contextlib.closing(roll_call._enter(member(1, port=server.getsockname()[1]), HARD_LIMIT_S)):
            gathering.wait(HARD_LIMIT_S)
        thread.join()
    assert gathering.missing == []
