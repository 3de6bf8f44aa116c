"""The processes of one run meet: each finds process 0 at the coordinator's address, and all wait until nobody is missing.

This comes before jax, whose own service tells nobody who is missing. `docs/multihost.md` says what is left to jax.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Collection, Iterator

from maverick_jax.errors import UserError
from maverick_jax.sharding import greeting
from maverick_jax.sharding.cluster import BIND_ADDRESS, TOKEN, Cluster
from maverick_jax.sharding.connection import GREETING_BYTES, Connection, Garbled, Gone
from maverick_jax.sharding.connection import connect as _connect
from maverick_jax.sharding.door import Door
from maverick_jax.sharding.team import INTERRUPTED as INTERRUPTED
from maverick_jax.sharding.team import LOST as LOST
from maverick_jax.sharding.team import MISTAKE as MISTAKE
from maverick_jax.sharding.team import Team

OWN_ADDRESS_S = 60  # process 0 must reach itself within this: a new pod's name takes a while to be known
NOTICE_S = 15  # when a waiting process says so


def meet(cluster: Cluster, limit_s: float) -> Team:
    """Wait until all processes have arrived.

    Raises:
      UserError: somebody is missing, process 0 cannot be reached, or the processes disagree about who they are.
    """
    return _await_others(cluster, limit_s) if cluster.process == 0 else _reach_first(cluster, limit_s)


def _await_others(cluster: Cluster, limit_s: float) -> Team:
    end = time.monotonic() + limit_s
    listener = _listen(cluster, min(limit_s, OWN_ADDRESS_S))
    door = Door(cluster, listener)
    try:
        here = listener.getsockname()[0]
        _reach_self(cluster, door, min(limit_s, OWN_ADDRESS_S))
        if not cluster.token and not _is_loopback(here):
            print(f"maverick: whoever reaches {cluster.coordinator} can join this run: set {TOKEN} to keep others out.", file=sys.stderr)
        notice = _Notice()
        while door.awaited:
            if door.problem:
                raise UserError(door.problem)
            if time.monotonic() > end:
                raise UserError(_missing(cluster, door.missing, limit_s))
            notice(f"process 0 waits at {cluster.coordinator} for {processes(door.missing)} of {cluster.count}")
            door.wait(0.2)
        port = _port_for_jax(cluster, here)
    except BaseException as error:
        door.close()
        for connection in door.arrived.values():
            connection.send(end=str(error) or "process 0 was interrupted")
            connection.close()
        raise
    for connection in door.arrived.values():
        connection.send(start=port)
    return Team(cluster, door.arrived, cluster.at_port(port), bind=f"[{here}]:{port}" if ":" in here else f"{here}:{port}", door=door)


def _listen(cluster: Cluster, limit_s: float) -> socket.socket:
    """On the coordinator's own address; on all of the machine's where that is none of them."""
    host, port = cluster.host_and_port
    for address in [cluster.bind_host] if cluster.bind_host else _own_addresses(cluster, host, limit_s):
        with contextlib.suppress(_NotHere):
            return _listener(address, port, backlog=cluster.count + 128)
    raise UserError(f"{BIND_ADDRESS} {cluster.bind_host!r} is no address of the machine of process 0: mend it, or leave it away.")


def _own_addresses(cluster: Cluster, host: str, limit_s: float) -> Iterator[str]:
    """Where process 0 may have to listen, the best first.

    Behind NAT or a Kubernetes service others know this machine by an address that it has not. And a name that means
    loopback here, as Debian writes it into /etc/hosts, means the machine's real address elsewhere.
    """
    end = time.monotonic() + limit_s
    while True:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            break
        except OSError as error:
            if time.monotonic() > end:
                raise _leads_elsewhere(cluster, _reason(error)) from error
        time.sleep(0.2)
    addresses = [str(address[0]) for _, _, _, _, address in found]
    is_meant = host == "localhost" or _is_address(host)
    yield from (address for address in addresses if is_meant or not _is_loopback(address))
    yield "::" if socket.has_dualstack_ipv6() else "0.0.0.0"


class _NotHere(Exception):
    """An address of another machine."""


def _listener(address: str, port: int, backlog: int = 1) -> socket.socket:
    """Not to be shared with another process, as jax's is: two runs of one user at one port would get each other's processes."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server(
            (address, port), family=family, backlog=backlog, dualstack_ipv6=address == "::" and socket.has_dualstack_ipv6()
        )
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, None) or isinstance(error, socket.gaierror):
            raise _NotHere from error
        why = "another job uses it; choose another port" if error.errno == errno.EADDRINUSE else "choose another port"
        raise UserError(f"process 0 cannot listen on port {port} ({os.strerror(error.errno)}): {why}.") from error


def _port_for_jax(cluster: Cluster, address: str) -> int:
    """A free one for jax's service, as the roll call keeps its own: the user's, or one that the system chooses."""
    wanted = cluster.bind_port if cluster.bind_port != cluster.host_and_port[1] else 0
    with _listener(address, wanted) as probe:
        return probe.getsockname()[1]


def _reach_self(cluster: Cluster, door: Door, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not door.found_itself.is_set():
        connected = _connect(cluster.host_and_port, end - time.monotonic())
        if isinstance(connected, OSError):
            raise _leads_elsewhere(cluster, _reason(connected)) from connected
        connection = Connection(connected)
        connection.send(hello=greeting.PROTOCOL, nonce=door.own_nonce)
        door.found_itself.wait(min(limit_s, 5.0))
        connection.close()
        if not door.found_itself.is_set() and time.monotonic() > end:
            raise _leads_elsewhere(cluster, "another program answers")


def _leads_elsewhere(cluster: Cluster, reason: str) -> UserError:
    return UserError(
        f"{cluster.coordinator} ({cluster.found_by}) does not lead to process 0, which runs here and cannot reach itself there "
        f"({reason}): JAX_COORDINATOR_ADDRESS must name this machine."
    )


def _missing(cluster: Cluster, missing: Collection[int], limit_s: float) -> str:
    return (
        f"{processes(missing)} of {cluster.count} did not arrive at {cluster.coordinator} within {limit_s:.0f} s: see that each was "
        f"started and that its messages tell no error; their number comes from {cluster.found_by}."
    )


def _reach_first(cluster: Cluster, limit_s: float) -> Team:
    connection = _enter(cluster, limit_s)
    try:
        # Process 0 gives up first, and says why.
        answer = connection.receive(limit=GREETING_BYTES, deadline=time.monotonic() + limit_s + OWN_ADDRESS_S)
    except (Gone, Garbled):
        answer = {}
    match answer:
        case {"start": int(port)} if type(port) is int and 0 < port < 65536:
            return Team(cluster, {0: connection}, cluster.at_port(port))
        case {"end": str(reason)}:
            connection.close()
            raise UserError(reason)
    connection.close()
    raise _none_of_ours(cluster)


def _enter(cluster: Cluster, limit_s: float) -> Connection:
    """A connection to process 0, each having shown the other that it belongs to this run."""
    end = time.monotonic() + limit_s
    notice = _Notice(f"process {cluster.process} looks for process 0 at {cluster.coordinator}")
    while True:
        found = _connect(cluster.host_and_port, end - time.monotonic(), notice)
        if isinstance(found, OSError):
            raise UserError(
                f"process {cluster.process} found no process 0 at {cluster.coordinator} ({cluster.found_by}) within {limit_s:.0f} s "
                f"({_reason(found)}): see that process 0 runs on that machine and that no firewall closes the port."
            ) from found
        connection = Connection(found)
        try:
            greeting.introduce(connection, cluster.token, cluster.process, cluster.count, time.monotonic() + greeting.GREETING_S)
            return connection
        except Gone:  # a proxy before process 0 has started, or too many at its door at once
            connection.close()
            if time.monotonic() > end:
                raise _none_of_ours(cluster) from None
        except Garbled:
            connection.close()
            raise _none_of_ours(cluster) from None
        except UserError:
            connection.close()
            raise
        except greeting.Stranger:
            connection.close()
            raise UserError(
                f"process 0 at {cluster.coordinator} ({cluster.found_by}) has another token than process {cluster.process}: it belongs to "
                f"another run, which needs another port, or {TOKEN} (without it, the launcher's job id) is not the same for all."
            ) from None
        notice()
        time.sleep(0.2)


def _none_of_ours(cluster: Cluster) -> UserError:
    return UserError(
        f"what answers at {cluster.coordinator} ({cluster.found_by}) is not process 0 of this run, or process 0 has died or started "
        f"without process {cluster.process}: see its messages, or mend the address."
    )


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return False


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


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
