"""The door of process 0: who knocks is heard in a thread of his own, and let in when he has shown that he belongs to the run.

Always: a number is let in once; who has not greeted within `GREETING_S` is sent away; at most so many are heard at once as
processes are missing and `STRANGERS` more, and beyond that the one who has waited longest has to go. The door stays when all
are in: its port stays taken, and late comers are told.
"""

from __future__ import annotations

import socket
import threading
import time

from maverick_jax.sharding import greeting
from maverick_jax.sharding.cluster import TOKEN, Cluster
from maverick_jax.sharding.connection import Connection, Garbled, Gone

STRANGERS = 64
LOOK_UP_S = 0.2  # how often the door sees whether it is to close


class Door:
    """
    Attributes:
      arrived: the others by number, each with its connection.
      problem: why there can be no run, such as two processes of one number; "" while there is none.
      own_nonce, found_itself: process 0 knocks with this nonce, to see whether its address leads here, and this is set when it does.
    """

    def __init__(self, cluster: Cluster, listener: socket.socket):
        self.cluster = cluster
        self.arrived: dict[int, Connection] = {}
        self.problem = ""
        self.own_nonce, self.found_itself = greeting.new_nonce(), threading.Event()
        self._listener = listener
        self._heard: dict[Connection, None] = {}  # in the order in which they came
        self._changed = threading.Condition()
        self._closed = False
        self._answering = threading.Thread(target=self._answer, daemon=True, name="door")
        self._answering.start()

    @property
    def awaited(self) -> int:
        """How many are still to come."""
        return self.cluster.count - 1 - len(self.arrived)

    @property
    def missing(self) -> list[int]:
        return sorted(set(range(1, self.cluster.count)) - self.arrived.keys())

    def wait(self, seconds: float) -> None:
        """Until all are in or something is wrong, but no longer than this."""
        with self._changed:
            self._changed.wait_for(lambda: not self.awaited or self.problem, seconds)

    def close(self) -> None:
        """Hear nobody any more, and free the port. Who is in stays connected."""
        self._closed = True
        self._answering.join()
        with self._changed:
            for connection in self._heard:
                connection.hang_up()

    def _answer(self) -> None:
        self._listener.settimeout(LOOK_UP_S)
        with self._listener:
            while not self._closed:
                try:
                    caller = self._listener.accept()[0]
                except TimeoutError:
                    continue
                except OSError:  # the caller is gone already, or this process has as many files open as it may
                    time.sleep(LOOK_UP_S)
                    continue
                try:
                    self._let_knock(Connection(caller))
                except (OSError, RuntimeError):  # gone, or no thread to be had
                    caller.close()

    def _let_knock(self, connection: Connection) -> None:
        with self._changed:
            self._heard[connection] = None
            if len(self._heard) > self.awaited + STRANGERS:
                oldest = next(iter(self._heard))
                del self._heard[oldest]
                oldest.hang_up()
        threading.Thread(target=self._hear, args=(connection,), daemon=True, name="at the door").start()

    def _hear(self, connection: Connection) -> None:
        let_in = False
        try:
            let_in = self._greet(connection, time.monotonic() + greeting.GREETING_S)
        except (Gone, Garbled, greeting.Stranger):  # a port scanner, a slow or an endless line, another run: nobody to talk to
            pass
        finally:
            with self._changed:
                self._heard.pop(connection, None)
            if not let_in:
                connection.close()

    def _greet(self, connection: Connection, deadline: float) -> bool:
        """Whether the caller was let in."""
        nonce = greeting.hear(connection, deadline)
        if nonce == self.own_nonce:
            self.found_itself.set()
            return False
        process, count = greeting.ask(connection, self.cluster.token, nonce, deadline)
        with self._changed:
            refusal = self._refusal(process, count)
            if not refusal:
                connection.send(welcome=True)
                self.arrived[process] = connection
            elif self.awaited and not self.problem:  # there can be no run: all are told
                self.problem = refusal
            self._changed.notify_all()
        if refusal:
            connection.send(end=refusal)
        return not refusal

    def _refusal(self, process: int, count: int) -> str:
        found_by = f"(by {self.cluster.found_by})"
        if not self.awaited:
            run = f"the run at {self.cluster.coordinator}"
            return f"all {self.cluster.count} processes of {run} are there: this one is too many {found_by}."
        if count != self.cluster.count:
            told = f"process {process} was told of {count} processes, process 0 of {self.cluster.count}"
            return f"{told}: give all the same number {found_by}."
        if process in self.arrived or process == 0:
            or_two_runs = "" if self.cluster.token else f", or each of two runs its own {TOKEN}"
            return f"two processes say that they are process {process}: give each a number of its own{or_two_runs} {found_by}."
        return ""
