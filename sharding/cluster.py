"""Which processes belong together: read from what Cloud TPU, SLURM, Open MPI, Kubernetes or the user put into the environment.

Nothing here imports jax or waits for another machine.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import re
import socket
import urllib.request
from collections.abc import Callable, Mapping
from typing import TypedDict

from maverick_jax.errors import UserError

PORT = 8482  # where jax itself puts the coordinator on a TPU
ADDRESS, PORT_VARIABLE, COUNT, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One process among several.

    Attributes:
      coordinator: "host:port" of process 0.
      count, process: how many there are, and which one this is.
      found_by: who said so.
      local_device: the one GPU of this process where several processes share a machine; None: all of the machine's devices.
    """

    coordinator: str
    count: int
    process: int
    found_by: str
    local_device: int | None = None

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


class Found(TypedDict, total=False):
    """What one launcher tells; the user's JAX_* variables fill in and overrule."""

    found_by: str
    address: str
    count: int
    process: int
    local_device: int | None


def find_cluster(
    environment: Mapping[str, str],
    *,
    tpu_metadata: Callable[[str], str | None] | None = None,
    full_name: Callable[[], str] = socket.getfqdn,
) -> Cluster | None:
    """The processes that the environment announces; None: this one is alone.

    Args:
      environment: as `os.environ`.
      tpu_metadata: value of an attribute of the Google Cloud machine, None where it has none; None asks the machine, if it
        has TPUs.
      full_name: this machine's name with its domain.

    Raises:
      UserError: the variables contradict each other, are no numbers, or something is missing.
    """
    found = _open_mpi(environment) or _slurm(environment) or _tpu(environment, tpu_metadata) or _kubernetes(environment, full_name) or {}
    found_by = found.get("found_by", "the environment")
    if environment.get(ADDRESS) or environment.get(COUNT) or environment.get(PROCESS):
        found_by = f"{found_by} and the JAX_* variables" if found else "the JAX_* variables"
    count = _number(environment, COUNT) if environment.get(COUNT) else found.get("count")
    process = _number(environment, PROCESS) if environment.get(PROCESS) else found.get("process")
    address = environment.get(ADDRESS) or found.get("address")
    if count == 1 or (count, process, address) == (None, None, None) or (count is None and not environment.get(ADDRESS)):
        return None
    for value, variable, what in (
        (count, COUNT, "how many processes there are"),
        (process, PROCESS, "which of them this one is, from 0"),
        (address, ADDRESS, "HOST:PORT of process 0"),
    ):
        if value is None:
            raise UserError(f"{found_by} announces several processes but not {what}: set {variable}.")
    assert count is not None
    assert process is not None
    if not 0 <= process < count:
        raise UserError(f"this is process {process} of {count} by {found_by}: they count from 0 to {count - 1}; mend {PROCESS} or {COUNT}.")
    return Cluster(_address(str(address), environment), count, process, found_by, found.get("local_device"))


def _address(address: str, environment: Mapping[str, str]) -> str:
    host, colon, port = address.rpartition(":")
    if not colon or (":" in host and not address.startswith("[")):  # a name, or a bare IPv6 address
        host, port = address, environment.get(PORT_VARIABLE) or str(PORT)
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"{ADDRESS} {address!r} is not HOST:PORT: give a name or address of process 0's machine and a free port there.")
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _number(environment: Mapping[str, str], variable: str) -> int:
    if not environment[variable].isdigit():
        raise UserError(f"{variable} is {environment[variable]!r}, not a number.")
    return int(environment[variable])


def _slurm(environment: Mapping[str, str]) -> Found | None:
    """A task of `srun`. Counts the tasks of the step, as an allocation may hold more than were started."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if not all(environment.get(name) for name in names):
        return None
    first = re.match(r"([^,\[]+)(?:\[(\w+))?", environment["SLURM_STEP_NODELIST"])  # node7, node[003-010,12], a,b
    shared = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")[:2] not in ("1", "1(", "1,")
    return {
        "found_by": "SLURM",
        "address": f"{''.join(filter(None, first.groups()))}:{_free_port(_number(environment, 'SLURM_JOB_ID'))}" if first else "",
        "count": _number(environment, "SLURM_STEP_NUM_TASKS"),
        "process": _number(environment, "SLURM_PROCID"),
        "local_device": _own_device(environment, "SLURM_LOCALID") if shared else None,
    }


def _open_mpi(environment: Mapping[str, str]) -> Found | None:
    """A rank of `mpirun`. Open MPI 4 tells where mpirun runs, taken for process 0's machine; 5 does not."""
    if not environment.get("OMPI_COMM_WORLD_SIZE") or not environment.get("OMPI_COMM_WORLD_RANK"):
        return None
    found: Found = {
        "found_by": "Open MPI",
        "count": _number(environment, "OMPI_COMM_WORLD_SIZE"),
        "process": _number(environment, "OMPI_COMM_WORLD_RANK"),
        "local_device": _own_device(environment, "OMPI_COMM_WORLD_LOCAL_RANK")
        if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") != "1"
        else None,
    }
    uri = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,\]]+?)(?:,|\]|:\d+$)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if uri:
        host = f"[{uri[2]}]" if ":" in uri[2] else uri[2]
        found["address"] = f"{host}:{_free_port(int(uri[1]) // 2**12)}"  # job ids are multiples of 2^12
    return found


def _tpu(environment: Mapping[str, str], metadata: Callable[[str], str | None] | None) -> Found | None:
    """A host of a TPU slice, or of several: from Google Kubernetes Engine's variables or the machine's metadata."""
    if "tpu" not in (environment.get("JAX_PLATFORMS") or "tpu"):
        return None
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    worker = environment.get("TPU_WORKER_ID")
    if not workers or not worker:
        if metadata is None:
            metadata = _ask_machine if _has_tpu() and "TPU_SKIP_MDS_QUERY" not in environment else lambda name: None
        workers, worker = metadata("worker-network-endpoints"), metadata("agent-worker-number")
    if not workers or not worker or not worker.isdigit() or " " in workers:
        return None
    hosts = [_endpoint_host(endpoint) for endpoint in workers.split(",")]
    slices, index = (int(environment.get(name) or default) for name, default in (("MEGASCALE_NUM_SLICES", 1), ("MEGASCALE_SLICE_ID", 0)))
    coordinator = environment.get("MEGASCALE_COORDINATOR_ADDRESS")
    return {
        "found_by": "Cloud TPU",
        "address": f"{coordinator.rpartition(':')[0] or coordinator if coordinator else hosts[0]}:{PORT}",
        "count": len(hosts) * slices,
        "process": int(worker) + index * len(hosts),
    }


def _kubernetes(environment: Mapping[str, str], full_name: Callable[[], str]) -> Found | None:
    """A pod of an indexed Job or JobSet; the pods' number stands nowhere in the pod, so the user writes JAX_NUM_PROCESSES."""
    index = environment.get("JOB_COMPLETION_INDEX")
    if not index or "KUBERNETES_SERVICE_HOST" not in environment:
        return None
    found: Found = {"found_by": "Kubernetes", "process": _number(environment, "JOB_COMPLETION_INDEX")}
    if environment.get(COUNT) and not environment.get(ADDRESS):
        pod, _, domain = full_name().partition(".")
        if domain and pod.endswith(f"-{index}"):
            found["address"] = f"{pod.removesuffix(index)}0.{domain}:{PORT}"
    return found


def _free_port(job: int) -> int:
    """A port among the last 4,096, the same in all processes of a job, another for most other jobs; jax's own choice."""
    return 65536 - 2**12 + job % 2**12


def _own_device(environment: Mapping[str, str], variable: str) -> int | None:
    """The device that belongs to this process's number on its machine, unless the launcher shows it only that one."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return None if visible and "," not in visible else _number(environment, variable)


def _endpoint_host(endpoint: str) -> str:
    """`host`, `host:port`, or `name:id:address` of older machines."""
    parts = endpoint.split(":")
    return parts[2] if len(parts) == 3 else parts[0]


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")) and importlib.util.find_spec("libtpu") is not None


def _ask_machine(name: str) -> str | None:
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:  # no Google Cloud, or no such attribute: a machine of its own
        return None
