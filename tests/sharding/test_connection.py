"""One end of a connection: messages, limits of size and time, and a neighbour whose machine is lost."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from maverick_jax.errors import UserError
from maverick_jax.sharding import connection
from maverick_jax.sharding.connection import KEEP_ALIVE, Connection, Garbled, Gone
from processes import soon


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one, other = socket.create_connection(server.getsockname()), server.accept()[0]
    with one, other:
        yield Connection(one), Connection(other)


def test_both_ends_keep_the_connection_alive(teams):
    """A machine that loses power closes nothing: without these its neighbours would wait in a collective for ever."""
    for process, peer in ((0, 1), (1, 0)):
        connected = teams[process]._peers[peer].socket
        assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        options = {name: connected.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in KEEP_ALIVE if hasattr(socket, name)}
        assert options == {name: value for name, value in KEEP_ALIVE.items() if hasattr(socket, name)}
        assert connected.gettimeout() is None


def test_a_machine_without_power_counts_as_lost_after_half_a_minute():
    """What the documentation says: idle 10 s, then four questions 5 s apart; data that nobody takes, 30 s."""
    assert KEEP_ALIVE["TCP_KEEPIDLE"] + KEEP_ALIVE["TCP_KEEPINTVL"] * KEEP_ALIVE["TCP_KEEPCNT"] == 30
    assert KEEP_ALIVE["TCP_USER_TIMEOUT"] == 30_000


def test_a_slow_line_is_read_while_there_is_time(ends):
    """Byte by byte, as long as the deadline holds."""
    one, other = ends
    for byte in b'{"a": 1}\n':
        one.socket.sendall(bytes([byte]))
    assert other.receive(deadline=soon()) == {"a": 1}
    with pytest.raises(Gone):
        other.receive(deadline=time.monotonic() + 0.05)
    with pytest.raises(Gone):
        other.receive(deadline=time.monotonic() - 1)
    assert other.socket.gettimeout() is None


def test_lines_end_where_they_end(ends):
    """Two in one packet are two messages; a line as long as the limit is read, one byte more is not."""
    one, other = ends
    line = b'{"a": "' + b"x" * 91 + b'"}'
    one.socket.sendall(line + b"\n" + line + b"\n" + line + b" \n")
    assert [len(other.receive(limit=100)["a"]) for _ in range(2)] == [91, 91]
    with pytest.raises(Garbled, match="a line of more than 100 bytes"):
        other.receive(limit=100)


@pytest.mark.parametrize(
    "words", [b"", b"null", b"[1]", b'"x"', b"{", b"\xff", b"1" * 5000, b"[" * 60_000, b'{"a":' * 9000], ids=lambda w: str(w[:8])
)
def test_what_is_no_message(ends, words):
    """An error that readers expect: any other would end their thread, and with it the run's only way to notice."""
    one, other = ends
    one.socket.sendall(words + b"\n")
    with pytest.raises(Garbled):
        other.receive()


def test_an_endless_line_ends_at_the_limit(ends):
    """What is held of it is bounded, however much comes."""
    one, other = ends

    def send():
        with contextlib.suppress(OSError):
            one.socket.sendall(bytes(2**24))
        one.hang_up()

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(Garbled, match="a line of more than 65,536 bytes"):
        other.receive(limit=connection.GREETING_BYTES)
    assert len(other._received) == 0
    other.close()
    sender.join()


def test_strangers_have_lines_of_64_kib():
    """Longer ones are for members."""
    assert connection.GREETING_BYTES == 65_536
    assert connection.MESSAGE_BYTES >= 10_000_000 * 8  # a prompt of ten million tokens


def test_a_message_that_is_too_long_is_refused_where_it_is_sent(teams, monkeypatch):
    """An error that says what to do, instead of a neighbour that hangs up."""
    monkeypatch.setattr(connection, "MESSAGE_BYTES", 1000)
    for one in teams.values():
        with pytest.raises(UserError, match=r"a message of 1,\d\d\d bytes is more than the 1,000 .*: take a shorter prompt"):
            one._peers[1 - one.process].send(value="x" * 1000)
