"""A run of several processes: started together, told the same, ended together.

`initialize` finds the processes, waits for them and starts `jax.distributed`. A process that is alone pays nothing, and
every function here also works for it.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import jax

from maverick_jax.errors import UserError, first_line
from maverick_jax.sharding import roll_call
from maverick_jax.sharding.cluster import BIND_ADDRESS, find_cluster
from maverick_jax.sharding.connection import connect

START_LIMIT = "MAVERICK_START_LIMIT"
START_LIMIT_S = 600.0  # machines of a large job appear minutes apart
LONGEST_START_S = 10**6
SERVICE_S = 60.0  # process 0 starts jax's service at once when all have arrived
_team: roll_call.Team | None = None


def initialize(limit_s: float | None = None) -> None:
    """Join the other processes of this run, if there are any, before jax starts its backend. A second call does nothing.

    Found are Cloud TPU, SLURM, Open MPI, Kubernetes, and JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID, which
    overrule the others. From here on a process that dies ends the others, with a line that names it.

    Args:
      limit_s: seconds to wait for all; None: $MAVERICK_START_LIMIT, or ten minutes.

    Raises:
      UserError: says which processes are missing, or what is wrong with the address or the numbers.
    """
    global _team
    if _team is not None:
        return
    limit_s = _start_limit(limit_s)
    cluster = find_cluster(os.environ)
    if cluster is None:
        return
    if jax.distributed.is_initialized():
        raise UserError("jax.distributed runs already: let maverick_jax.sharding.multihost.initialize start it instead.")
    _team = roll_call.meet(cluster, limit_s)
    atexit.register(_leave)
    sys.excepthook = _uncaught
    # Its handler would swallow SIGTERM, with which launchers end a process.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if _team.process != 0:
            _wait_for_service(_team.coordinator, limit_s)
        jax.distributed.initialize(
            _team.coordinator,
            cluster.count,
            cluster.process,
            None if cluster.local_device is None else [cluster.local_device],
            cluster_detection_method="deactivate",
            initialization_timeout=int(limit_s) + 1,
            coordinator_bind_address=_team.bind,
        )
    except RuntimeError as error:
        raise UserError(f"jax.distributed does not start: {error}") from error


def _start_limit(limit_s: float | None = None) -> float:
    given, said_by = limit_s, "limit_s"
    if limit_s is None:
        given, said_by = os.environ.get(START_LIMIT) or START_LIMIT_S, START_LIMIT
    try:
        seconds = float(given)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds <= LONGEST_START_S:
        raise UserError(f"{said_by} is {given!r}, not a number of seconds above 0 and up to {LONGEST_START_S:,}.")
    return seconds


def _wait_for_service(address: str, limit_s: float) -> None:
    """jax aborts the process, with a stack trace, where it cannot reach its own service."""
    host, _, port = address.rpartition(":")
    connected = connect((host.strip("[]"), int(port)), min(limit_s, SERVICE_S))
    if isinstance(connected, OSError):
        raise UserError(
            f"no way to jax's service at {address} ({connected.strerror or connected}), on the machine of process 0: open that port in the "
            f"firewall, or choose an open one by {BIND_ADDRESS}=HOST:PORT on process 0."
        ) from connected
    connected.close()


@contextlib.contextmanager
def joined(limit_s: float | None = None) -> Iterator[None]:
    """`initialize`, and an error that leaves the block ends all processes, with a line that says whose it was."""
    try:
        initialize(limit_s)
        yield
    except BaseException as error:
        report(error)
        raise


def tell_interrupted() -> None:
    """Ctrl-C ends this process at once: tell the others why."""
    report(KeyboardInterrupt())


def report(error: BaseException) -> None:
    """This process ends with an error: the others end too, with a line that names it."""
    if _team is None or _team.failed is not None:
        return
    if isinstance(error, KeyboardInterrupt):
        _team.fail("interrupted", roll_call.INTERRUPTED)
    else:
        _team.fail(first_line(error), roll_call.MISTAKE if isinstance(error, UserError) else roll_call.LOST)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In place of `sys.excepthook`: a script's error ends all processes too."""
    report(error)
    sys.__excepthook__(kind, error, trace)


def _leave() -> None:
    """At exit, before jax's own farewell, in which each process waits for all others."""
    assert _team is not None
    if _team.failed is None:
        _team.finish()
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(_team.failed)


def process_count() -> int:
    """Processes of this run, without starting jax's backend."""
    return 1 if _team is None else _team.count


def process_index() -> int:
    """Number of this process, without starting jax's backend."""
    return 0 if _team is None else _team.process


def is_first() -> bool:
    """Whether this process is the one that talks with the user."""
    return process_index() == 0


def exchange(value: Any) -> list[Any]:
    """What each process gave, by process; all must call it. `value` is anything that JSON can hold."""
    return [value] if _team is None else _team.exchange(value)


def from_first(values: Iterable[Any]) -> Iterator[Any]:
    """Process 0's values, on every process as they come; the others' own are not asked for. An empty list marks the end."""
    if _team is None:
        yield from values
    elif _team.process == 0:
        for value in values:
            exchange([value])
            yield value
        exchange([])
    else:
        while message := exchange(None)[0]:
            yield message[0]


def check_same(parts: Mapping[str, str]) -> None:
    """Refuse to go on unless all processes have the same; all must call it.

    Args:
      parts: what to compare, by the name that the user knows it by; long contents as a digest.

    Raises:
      UserError: on every process, naming each part that differs and who has what.
    """
    everyone = exchange(dict(parts))
    names = dict.fromkeys(name for one in everyone for name in one)
    texts = [_difference(name, [one.get(name, "nothing") for one in everyone]) for name in names]
    if differing := [text for text in texts if text]:
        raise UserError(f"the processes of this run differ. {'; '.join(differing)}: start all of them with the same.")


def _difference(name: str, values: list[str]) -> str:
    owners: dict[str, list[int]] = {}
    for process, value in enumerate(values):
        owners.setdefault(value, []).append(process)
    if len(owners) == 1:
        return ""
    return f"{name} is " + ", ".join(f"{value} on {roll_call.processes(those)}" for value, those in owners.items())
