"""All processes of a run, once they have met: what they tell each other, and how they end together.

Every process keeps one connection to process 0. It carries what the hosts must agree on without a collective, which would
time out while a user thinks; and when a process dies its connection closes at once, where jax notices after minutes and
aborts. Messages: `value` (a turn of an exchange), `finished`, and `end` with an exit `status`.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from typing import Any

from maverick_jax.sharding.cluster import Cluster
from maverick_jax.sharding.connection import Connection, Garbled, Gone
from maverick_jax.sharding.door import Door

GRACE_S = 2  # for a process to report its own mistake before a neighbour's, which may be the same
LOST, MISTAKE, INTERRUPTED = 1, 2, 130  # exit status


class Team:
    """All processes of the run, seen from one of them.

    Attributes:
      process, count: this one, and how many there are.
      coordinator: HOST:PORT where jax's own service is to be.
      bind: of process 0: HOST:PORT on which that service listens; None elsewhere.
      failed: the exit status of this process once it has reported an error of its own.
    """

    def __init__(self, cluster: Cluster, peers: dict[int, Connection], coordinator: str, bind: str | None = None, door: Door | None = None):
        self.process, self.count = cluster.process, cluster.count
        self.coordinator, self.bind = coordinator, bind
        self._peers = peers  # of process 0: all others; of another: process 0
        self._door = door  # of process 0
        self._inbox: dict[int, queue.Queue[Any]] = {peer: queue.Queue(maxsize=1) for peer in peers}  # each waits for an answer
        self._finished: set[int] = set()
        self._ending = threading.Lock()  # taken once, by whoever reports why this process ends
        self.failed: int | None = None
        self._listeners = [threading.Thread(target=self._listen, args=(peer,), daemon=True, name=f"process {peer}") for peer in peers]
        for listener in self._listeners:
            listener.start()

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
        if self.process == 0 and status != INTERRUPTED:  # jax's service ends with it, and aborts who is still there
            last = time.monotonic() + 2 * GRACE_S
            for listener in self._listeners:
                listener.join(max(0.0, last - time.monotonic()))

    def finish(self) -> None:
        """Tell the others that this process ends in order."""
        for connection in self._peers.values():
            connection.send(finished=True)
        if self._door:
            self._door.close()

    def _listen(self, peer: int) -> None:
        try:
            while True:
                self._take(peer, self._peers[peer].receive())
        except Gone:
            if peer in self._finished:
                self._peers[peer].close()
                return
            text = f"process {peer} is gone without a word (killed, out of memory, or its machine is lost): this process ends too."
        except Garbled as error:
            text = f"process {peer} sent {error}, which no process of ours does: this process ends too."
        self._relay(text, LOST)
        self._end(text, LOST)

    def _take(self, peer: int, message: dict[str, Any]) -> None:
        match message:
            case {"value": value} if peer != 0 or (isinstance(value, list) and len(value) == self.count):
                try:
                    self._inbox[peer].put_nowait(value)
                except queue.Full:
                    raise Garbled("a value before its turn") from None
            case {"finished": True}:
                self._finished.add(peer)
            case {"end": str(text), "status": int(status)} if status in (LOST, MISTAKE, INTERRUPTED) and type(status) is int:
                self._relay(text, status)
                time.sleep(GRACE_S)
                self._end(text, status)
            case _:
                raise Garbled("a message with other fields or values")

    def _relay(self, text: str, status: int) -> None:
        if self.process == 0:
            for connection in self._peers.values():
                connection.send(end=text, status=status)

    def _end(self, text: str, status: int) -> None:
        """From a reader's thread: the main thread may wait in a collective that nobody will ever answer."""
        if self._ending.acquire(blocking=False):
            try:
                print(f"maverick: process {self.process} of {self.count}: {' '.join(text.splitlines())}", file=sys.stderr, flush=True)
                sys.stdout.flush()
            except (OSError, ValueError):  # closed, or a character that the terminal has not: the process must end anyhow
                pass
            finally:
                os._exit(status)
