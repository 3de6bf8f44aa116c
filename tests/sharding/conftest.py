"""Processes of a run that meet, in threads."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator

import pytest

from maverick_jax.sharding import roll_call
from maverick_jax.sharding.cluster import Cluster
from maverick_jax.sharding.door import Door
from maverick_jax.sharding.team import Team
from processes import HARD_LIMIT_S, free_port, member


@pytest.fixture
def open_door() -> Iterator[Callable[..., Door]]:
    """`open_door(member)`: the door of process 0, closed after the test."""
    doors: list[Door] = []

    def opened(own: Cluster, listener: socket.socket | None = None) -> Door:
        doors.append(Door(own, listener or roll_call._listen(own, 1)))
        return doors[-1]

    yield opened
    for door in doors:
        door.close()
        for arrived in door.arrived.values():
            arrived.close()


@pytest.fixture
def gathering(open_door) -> Door:
    """The door of process 0, which waits for process 1."""
    return open_door(member())


def leave(teams: Iterable[Team], others: Collection[threading.Thread]) -> None:
    """All end in order, in threads: nothing stays open. `others` were there before, perhaps of a test whose process 0 never ends."""
    for one in teams:
        one.finish()
    for one in teams:
        for peer in one._peers.values():
            peer.hang_up()
    for thread in threading.enumerate():
        if thread.name.startswith("process ") and thread not in others:
            thread.join(HARD_LIMIT_S)


@pytest.fixture
def teams() -> Iterator[dict[int, Team]]:
    """Both processes of a run, in threads."""
    port, found, others = free_port(), {}, threading.enumerate()
    threads = [
        threading.Thread(target=lambda p=process: found.update({p: roll_call.meet(member(p, port=port), HARD_LIMIT_S)}))
        for process in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HARD_LIMIT_S)
    yield found
    leave(found.values(), others)
