"""The processes of one run hold together: they meet at start, pass small messages, and end together.

Every process keeps one TCP connection to process 0, made before jax connects, at the same address and port. It tells who
has not arrived, which jax does not; it carries what the hosts must agree on without a collective, which would time out
while a user thinks; and when a process dies its connection closes at once, where jax notices after minutes and aborts.
Messages are lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from maverick_jax.errors import UserError
from maverick_jax.sharding.cluster import Cluster

PROTOCOL = "maverick-jax 1"
OWN_ADDRESS_S = 60  # process 0 must reach itself within this: a new pod's name takes a while to be known
NOTICE_S = 15  # when a waiting process says so
GRACE_S = 2  # for a process to report its own mistake before a neighbour's, which may be the same
LOST, MISTAKE, INTERRUPTED = 1, 2, 130  # exit status


class Connection:
    """One end of a connection, with messages instead of bytes."""

    def __init__(self, connected: socket.socket):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine that loses power closes nothing: half a minute without an answer counts as lost. Not every system has these.
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
            if hasattr(socket, option):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.socket = connected
        self.lines = connected.makefile("rb")
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        with self._sending, contextlib.suppress(OSError):  # that a peer is gone, its reader tells
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; None: the peer is gone, or is none of ours."""
        try:
            message = json.loads(self.lines.readline())
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


class Team:
    """All processes of the run, seen from one of them.

    Attributes:
      process, count: this one, and how many there are.
      failed: the exit status of this process once it has reported an error of its own.
    """

    def __init__(self, cluster: Cluster, peers: dict[int, Connection]):
        self.process, self.count = cluster.process, cluster.count
        self._peers = peers  # of process 0: all others; of another: process 0
        self._inbox: dict[int, queue.Queue[Any]] = {peer: queue.Queue() for peer in peers}
        self._finished: set[int] = set()
        self._ending = threading.Lock()  # taken once, by whoever reports why this process ends
        self.failed: int | None = None
        for peer in peers:
            threading.Thread(target=self._listen, args=(peer,), daemon=True, name=f"process {peer}").start()

    def exchange(self, value: Any) -> list[Any]:
        """What every process gave, by process; all must call it. `value`: anything that JSON can hold."""
        if self.process != 0:
            self._peers[0].send(value=value)
            return self._inbox[0].get()
        values = [value, *(self._inbox[peer].get() for peer in sorted(self._peers))]
        for connection in self._peers.values():
            connection.send(value=values)
        return values

    def fail(self, reason: str, status: int) -> None:
        """Tell the others that this process ends with an error, and with which exit status."""
        if status == LOST:  # no user's mistake: it may be the echo of a neighbour's death, which then is what to report
            time.sleep(GRACE_S)
        self._ending.acquire()  # while a neighbour's end is being reported, this thread waits here for the process to end
        self.failed = status
        for connection in self._peers.values():
            connection.send(end=f"process {self.process} failed: {reason}", status=status)

    def finish(self) -> None:
        """Tell the others that this process ends in order."""
        for connection in self._peers.values():
            connection.send(finished=True)

    def _listen(self, peer: int) -> None:
        while (message := self._peers[peer].receive()) is not None:
            if "value" in message:
                self._inbox[peer].put(message["value"])
            elif "finished" in message:
                self._finished.add(peer)
            elif "end" in message:
                self._relay(message)
                time.sleep(GRACE_S)
                self._end(message["end"], message["status"])
        if peer not in self._finished:
            text = f"process {peer} is gone without a word (killed, out of memory, or its machine is lost): this process ends too."
            self._relay({"end": text, "status": LOST})
            self._end(text, LOST)

    def _relay(self, message: dict[str, Any]) -> None:
        if self.process == 0:
            for connection in self._peers.values():
                connection.send(**message)

    def _end(self, text: str, status: int) -> None:
        """From a reader's thread: the main thread may wait in a collective that nobody will ever answer."""
        if self._ending.acquire(blocking=False):
            with contextlib.suppress(OSError):
                print(f"maverick: process {self.process} of {self.count}: {text}", file=sys.stderr, flush=True)
                sys.stdout.flush()
            os._exit(status)


def meet(cluster: Cluster, limit_s: float) -> Team:
    """Wait until all processes have arrived.

    Raises:
      UserError: somebody is missing, process 0 cannot be reached, or the processes disagree about who they are.
    """
    if cluster.process == 0:
        return Team(cluster, _await_others(cluster, limit_s))
    return Team(cluster, {0: _reach_first(cluster, limit_s)})


def _await_others(cluster: Cluster, limit_s: float) -> dict[int, Connection]:
    started = time.monotonic()
    arrived: dict[int, Connection] = {}
    with _listener(cluster) as listener:
        try:
            _reach_self(cluster, min(limit_s, OWN_ADDRESS_S))
            notice = _Notice()
            listener.settimeout(0.2)
            while missing := sorted(set(range(1, cluster.count)) - arrived.keys()):
                if time.monotonic() - started > limit_s:
                    raise UserError(_missing(cluster, missing, limit_s))
                notice(f"process 0 waits at {cluster.coordinator} for {processes(missing)} of {cluster.count}")
                with contextlib.suppress(TimeoutError):
                    _welcome(cluster, Connection(listener.accept()[0]), arrived)
        except UserError as error:
            for connection in arrived.values():
                connection.send(end=str(error))
                connection.close()
            raise
    for connection in arrived.values():  # the port is free again: jax's coordinator takes it
        connection.send(start=True)
    return arrived


def _listener(cluster: Cluster) -> socket.socket:
    port = cluster.host_and_port[1]
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    listener = socket.socket(family)
    # jax's coordinator takes the port over while these connections live: both sides must allow sharing it.
    for option in ("SO_REUSEADDR", "SO_REUSEPORT"):
        if hasattr(socket, option):
            listener.setsockopt(socket.SOL_SOCKET, getattr(socket, option), 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    try:
        listener.bind(("", port))
        listener.listen(cluster.count + 8)
    except OSError as error:
        listener.close()
        raise UserError(f"process 0 cannot listen on port {port} ({error.strerror}): another job uses it; choose another port.") from error
    return listener


def _reach_self(cluster: Cluster, limit_s: float) -> None:
    error = _connect(cluster.host_and_port, limit_s)
    if isinstance(error, OSError):
        raise UserError(
            f"{cluster.coordinator} ({cluster.found_by}) does not lead to process 0, which runs here and cannot reach itself there "
            f"({_reason(error)}): JAX_COORDINATOR_ADDRESS must name this machine."
        ) from error
    error.close()


def _welcome(cluster: Cluster, connection: Connection, arrived: dict[int, Connection]) -> None:
    connection.socket.settimeout(5)
    hello = connection.receive() or {}
    if hello.get("hello") != PROTOCOL:  # a port scanner, or process 0 reaching itself
        connection.close()
        return
    connection.socket.settimeout(None)
    process, count, problem = hello["process"], hello["count"], ""
    if count != cluster.count:
        problem = f"process {process} was told of {count} processes, process 0 of {cluster.count}: give all the same number"
    elif process in arrived or process == 0:
        problem = f"two processes say that they are process {process}: give each a number of its own"
    if problem:
        connection.send(end=f"{problem} (by {cluster.found_by}).")
        connection.close()
        raise UserError(f"{problem} (by {cluster.found_by}).")
    arrived[process] = connection


def _missing(cluster: Cluster, missing: Collection[int], limit_s: float) -> str:
    return (
        f"{processes(missing)} of {cluster.count} did not arrive at {cluster.coordinator} within {limit_s:.0f} s: see that each was "
        f"started and that its messages tell no error; their number comes from {cluster.found_by}."
    )


def _reach_first(cluster: Cluster, limit_s: float) -> Connection:
    found = _connect(cluster.host_and_port, limit_s, _Notice(f"process {cluster.process} looks for process 0 at {cluster.coordinator}"))
    if isinstance(found, OSError):
        raise UserError(
            f"process {cluster.process} found no process 0 at {cluster.coordinator} ({cluster.found_by}) within {limit_s:.0f} s "
            f"({_reason(found)}): see that process 0 runs on that machine and that no firewall closes the port."
        ) from found
    connection = Connection(found)
    connection.send(hello=PROTOCOL, process=cluster.process, count=cluster.count)
    found.settimeout(limit_s + OWN_ADDRESS_S)  # process 0 gives up first, and says why
    answer = connection.receive()
    found.settimeout(None)
    if answer and "start" in answer:
        return connection
    connection.close()
    if answer and "end" in answer:
        raise UserError(answer["end"])
    raise UserError(
        f"what answers at {cluster.coordinator} ({cluster.found_by}) is not process 0 of this run, or process 0 has died or started "
        f"without process {cluster.process}: see its messages, or mend the address."
    )


def _connect(address: tuple[str, int], limit_s: float, notice: Callable[[], None] = lambda: None) -> socket.socket | OSError:
    """A connection, or why there was none in time."""
    started = time.monotonic()
    while True:
        try:
            connected = socket.create_connection(address, timeout=max(1.0, min(5.0, limit_s)))
            connected.settimeout(None)
            return connected
        except OSError as error:
            if time.monotonic() - started > limit_s:
                return error
        notice()
        time.sleep(0.2)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


class _Notice:
    """Says once, after a while, what is being waited for."""

    def __init__(self, text: str = ""):
        self.text, self.at = text, time.monotonic() + NOTICE_S

    def __call__(self, text: str = "") -> None:
        if time.monotonic() > self.at:
            print(f"maverick: {text or self.text} …", file=sys.stderr, flush=True)
            self.at = float("inf")


def processes(numbers: Collection[int]) -> str:
    """`process 3`, `processes 1, 2, 5-9`."""
    ordered, runs = sorted(numbers), []
    for number in ordered:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in runs)
    return f"process{'es' if len(ordered) > 1 else ''} {text}"
