"""Which processes belong together: read from what Cloud TPU, SLURM, Open MPI, Kubernetes or the user put into the environment.

Nothing here imports jax or waits for another machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import http.client
import importlib.util
import re
import socket
import threading
import urllib.request
from collections.abc import Callable, Mapping
from typing import TypedDict

from maverick_jax.config.checks import show
from maverick_jax.errors import UserError

PORT = 8482  # where jax itself puts the coordinator on a TPU
ADDRESS, PORT_VARIABLE, COUNT, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TOKEN, BIND_ADDRESS = "MAVERICK_RUN_TOKEN", "JAX_COORDINATOR_BIND_ADDRESS"
MOST_PROCESSES = 2**16
HOW_MANY, WHICH = "how many processes there are", "which of them this one is, from 0"
MEANING = {
    ADDRESS: "HOST:PORT of process 0",
    COUNT: HOW_MANY,
    PROCESS: WHICH,
    "SLURM_JOB_ID": "the number of the job",
    "SLURM_STEP_NUM_TASKS": HOW_MANY,
    "SLURM_PROCID": WHICH,
    "SLURM_LOCALID": "which process of its machine this one is, from 0",
    "OMPI_COMM_WORLD_SIZE": HOW_MANY,
    "OMPI_COMM_WORLD_RANK": WHICH,
    "OMPI_COMM_WORLD_LOCAL_RANK": "which process of its machine this one is, from 0",
    "TPU_WORKER_ID": "which host of its slice this one is, from 0",
    "MEGASCALE_NUM_SLICES": "how many slices there are",
    "MEGASCALE_SLICE_ID": "which slice this host is in, from 0",
    "JOB_COMPLETION_INDEX": "which pod of the job this one is, from 0",
}
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
METADATA_S = 5.0  # for the whole answer: a machine elsewhere may have a name server that never answers
METADATA_BYTES = 2**20  # a slice of ten thousand hosts


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One process among several.

    Attributes:
      coordinator: "host:port" of process 0.
      count, process: how many there are, and which one this is.
      found_by: who said so.
      local_device: the one GPU of this process where several processes share a machine; None: all of the machine's devices.
      token: what only the processes of this run share, the user's secret or the launcher's number of the job; "": nothing.
      bind_host, bind_port: where process 0 listens, and jax's service there, as far as the user says it.
    """

    coordinator: str
    count: int
    process: int
    found_by: str
    local_device: int | None = None
    token: str = dataclasses.field(default="", repr=False, compare=False)
    bind_host: str = ""
    bind_port: int = 0

    @property
    def host_and_port(self) -> tuple[str, int]:
        return _split(self.coordinator)

    def at_port(self, port: int) -> str:
        """Another port of the coordinator's host."""
        return f"{self.coordinator.rpartition(':')[0]}:{port}"


class Found(TypedDict, total=False):
    """What one launcher tells, and by which variable; the user's JAX_* variables fill in and overrule."""

    found_by: str
    address: str
    address_by: str
    count: int
    count_by: str
    process: int
    process_by: str
    local_device: int | None
    token: str


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
    found_by, users = found.get("found_by", ""), {name for name in (ADDRESS, COUNT, PROCESS) if environment.get(name)}
    if users:
        found_by = f"{found_by} and the JAX_* variables" if found else "the JAX_* variables"
    count = _number(environment, COUNT) if COUNT in users else found.get("count")
    process = _number(environment, PROCESS) if PROCESS in users else found.get("process")
    address = environment[ADDRESS] if ADDRESS in users else found.get("address")
    count_by, process_by, address_by = (
        variable if variable in users else by
        for variable, by in ((COUNT, found.get("count_by")), (PROCESS, found.get("process_by")), (ADDRESS, found.get("address_by")))
    )
    if (count == 1 and PROCESS not in users) or (count is None and not users):
        return None
    for value, variable in ((count, COUNT), (process, PROCESS), (address, ADDRESS)):
        if value is None and count != 1:
            read = ", ".join(filter(None, (address_by, count_by, process_by)))
            raise UserError(f"{found_by} ({read}) announces several processes but not {MEANING[variable]}: set {variable}.")
    assert count is not None
    assert process is not None
    if not 1 <= count <= MOST_PROCESSES:
        raise UserError(f"{count_by} announces {count} processes: a run has 1 to {MOST_PROCESSES:,}; mend it.")
    if not 0 <= process < count:
        raise UserError(
            f"this is process {process} by {process_by}, of {count} by {count_by}: "
            f"they count from 0 to {count - 1}; mend the one that is wrong."
        )
    if count == 1:
        return None
    # The user's own numbers may join processes of several jobs; a launcher's belong to one.
    token = environment.get(TOKEN) or ("" if environment.get(COUNT) and environment.get(PROCESS) else found.get("token", ""))
    bind = environment.get(BIND_ADDRESS)
    return Cluster(
        _address(str(address_by), str(address), environment),
        count,
        process,
        found_by,
        found.get("local_device"),
        token,
        *(_split(_address(BIND_ADDRESS, bind, environment)) if bind else ("", 0)),
    )


def _address(variable: str, address: str, environment: Mapping[str, str]) -> str:
    host, colon, port = address.rpartition(":")
    if not colon or (":" in host and not address.startswith("[")):  # a name, or a bare IPv6 address
        host, port = address, environment.get(PORT_VARIABLE) or str(PORT)
        if not _is_port(port):
            raise UserError(f"{PORT_VARIABLE} is {show(port)}, not the number of a port, 1 to 65535.")
    if not _is_host(host) or not _is_port(port):
        raise UserError(
            f"{variable} {show(address)} is not HOST:PORT: give a name or address of process 0's machine and a free port there"
            f"{'' if variable in (ADDRESS, BIND_ADDRESS) else f', by {ADDRESS}'}."
        )
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _is_port(text: str) -> bool:
    return _is_number(text) and 0 < int(text) < 65536


def _is_host(text: str) -> bool:
    """Whether a resolver may be asked for it: it raises what is no OSError for names such as `a..b`."""
    try:
        return bool(text.encode("idna")) and not re.search(r"[\s/]", text)
    except UnicodeError:
        return False


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _is_number(text: str) -> bool:
    return re.fullmatch("[0-9]{1,12}", text) is not None


def _number(environment: Mapping[str, str], variable: str) -> int:
    text = environment.get(variable)
    if text is None or not _is_number(text):
        found = "is not set" if text is None else f"is {show(text)}, not a number"
        raise UserError(f"{variable} {found}: it must be {MEANING[variable]}.")
    return int(text)


def _slurm(environment: Mapping[str, str]) -> Found | None:
    """A task of `srun`. Counts the tasks of the step, as an allocation may hold more than were started."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if not all(environment.get(name) for name in names):
        return None
    nodes = environment["SLURM_STEP_NODELIST"]
    first = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)  # node7, node[003-010,12], a,b
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST is {show(nodes)}, no list of machines such as node[1-4]: start the run by srun.")
    shared = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")[:2] not in ("1", "1(", "1,")
    return {
        "found_by": "SLURM",
        "address": f"{''.join(filter(None, first.groups()))}:{_free_port(_number(environment, 'SLURM_JOB_ID'))}",
        "address_by": "SLURM_STEP_NODELIST",
        "count": _number(environment, "SLURM_STEP_NUM_TASKS"),
        "count_by": "SLURM_STEP_NUM_TASKS",
        "process": _number(environment, "SLURM_PROCID"),
        "process_by": "SLURM_PROCID",
        "local_device": _own_device(environment, "SLURM_LOCALID") if shared else None,
        "token": f"SLURM {environment['SLURM_JOB_ID']}.{environment.get('SLURM_STEP_ID', '')}",
    }


def _open_mpi(environment: Mapping[str, str]) -> Found | None:
    """A rank of `mpirun`. Open MPI 4 tells where mpirun runs, taken for process 0's machine; 5 does not."""
    if not environment.get("OMPI_COMM_WORLD_SIZE") or not environment.get("OMPI_COMM_WORLD_RANK"):
        return None
    found: Found = {
        "found_by": "Open MPI",
        "count": _number(environment, "OMPI_COMM_WORLD_SIZE"),
        "count_by": "OMPI_COMM_WORLD_SIZE",
        "process": _number(environment, "OMPI_COMM_WORLD_RANK"),
        "process_by": "OMPI_COMM_WORLD_RANK",
        "local_device": _own_device(environment, "OMPI_COMM_WORLD_LOCAL_RANK")
        if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") != "1"
        else None,
        "token": environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid", ""),
    }
    uri = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,\]]+?)(?:,|\]|:\d+$)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if uri:
        host = f"[{uri[2]}]" if ":" in uri[2] else uri[2]
        found["address"] = f"{host}:{_free_port(int(uri[1]) // 2**12)}"  # job ids are multiples of 2^12
        found["address_by"] = "OMPI_MCA_orte_hnp_uri"
    return found


def _tpu(environment: Mapping[str, str], metadata: Callable[[str], str | None] | None) -> Found | None:
    """A host of a TPU slice, or of several: from Google Kubernetes Engine's variables or the machine's metadata."""
    if "tpu" not in (environment.get("JAX_PLATFORMS") or "tpu"):
        return None
    workers_by = "TPU_PROCESS_ADDRESSES" if environment.get("TPU_PROCESS_ADDRESSES") else "TPU_WORKER_HOSTNAMES"
    worker_by = "TPU_WORKER_ID"
    workers, worker = environment.get(workers_by), environment.get(worker_by)
    if not workers or not worker:
        if metadata is None:
            metadata = _ask_machine if _has_tpu() and "TPU_SKIP_MDS_QUERY" not in environment else lambda name: None
        workers_by, worker_by = "the machine's worker-network-endpoints", "the machine's agent-worker-number"
        workers, worker = metadata("worker-network-endpoints"), metadata("agent-worker-number")
    if not workers or not worker or " " in workers + worker:  # libtpu writes warnings there
        return None
    if not _is_number(worker):
        raise UserError(f"{worker_by} is {show(worker)}, not a number: it must be {MEANING['TPU_WORKER_ID']}.")
    hosts = [_endpoint_host(endpoint) for endpoint in workers.split(",")]
    slices, index = (
        _number(environment, name) if environment.get(name) else default
        for name, default in (("MEGASCALE_NUM_SLICES", 1), ("MEGASCALE_SLICE_ID", 0))
    )
    coordinator = environment.get("MEGASCALE_COORDINATOR_ADDRESS")
    return {
        "found_by": "Cloud TPU",
        "address": f"{coordinator.rpartition(':')[0] or coordinator if coordinator else hosts[0]}:{PORT}",
        "address_by": "MEGASCALE_COORDINATOR_ADDRESS" if coordinator else workers_by,
        "count": len(hosts) * slices,
        "count_by": f"{workers_by} and MEGASCALE_NUM_SLICES" if slices > 1 else workers_by,
        "process": int(worker) + index * len(hosts),
        "process_by": f"{worker_by} and MEGASCALE_SLICE_ID" if index else worker_by,
    }


def _kubernetes(environment: Mapping[str, str], full_name: Callable[[], str]) -> Found | None:
    """A pod of an indexed Job or JobSet; the pods' number stands nowhere in the pod, so the user writes JAX_NUM_PROCESSES."""
    index = environment.get("JOB_COMPLETION_INDEX")
    if not index or "KUBERNETES_SERVICE_HOST" not in environment:
        return None
    found: Found = {
        "found_by": "Kubernetes",
        "process": _number(environment, "JOB_COMPLETION_INDEX"),
        "process_by": "JOB_COMPLETION_INDEX",
    }
    if environment.get(COUNT) and not environment.get(ADDRESS):
        pod, _, domain = full_name().partition(".")
        if domain and pod.endswith(f"-{index}"):
            found["address"], found["address_by"] = f"{pod.removesuffix(index)}0.{domain}:{PORT}", "this pod's name"
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
    """An attribute of this machine by Google Cloud's metadata server; None: no Google Cloud, or no such attribute."""
    answers: list[str] = []
    # In a thread: a time limit of `urlopen` holds for each of its steps, and for none in the name server.
    asking = threading.Thread(target=_ask, args=(name, answers), daemon=True, name="metadata")
    asking.start()
    asking.join(METADATA_S)
    return answers[0] if answers else None


def _ask(name: str, answers: list[str]) -> None:
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.suppress(OSError, http.client.HTTPException, UnicodeDecodeError), direct.open(request, timeout=METADATA_S) as answer:
        text = answer.read(METADATA_BYTES + 1)
        if len(text) <= METADATA_BYTES and answer.headers.get("Metadata-Flavor") == "Google":  # no captive portal
            answers.append(text.decode())
