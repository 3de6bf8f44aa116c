"""Who this process is, by what each launcher puts into its environment."""

import contextlib
import http.server
import socket
import threading

import pytest

from maverick_jax.errors import UserError
from maverick_jax.sharding import cluster
from maverick_jax.sharding.cluster import Cluster, find_cluster
from processes import HARD_LIMIT_S

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[003-004,9]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a.svc,b.svc", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "job-slice-0-0.job:8080"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}
JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def no_metadata(name: str) -> None:
    return None


def find(environment: dict, metadata=no_metadata, full_name=lambda: "job-2.svc.default.svc.cluster.local"):
    return find_cluster(environment, tpu_metadata=metadata, full_name=full_name)


@pytest.mark.parametrize(
    "environment, expected",
    [
        (JAX, Cluster("10.0.0.1:1234", 2, 1, "the JAX_* variables")),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "first"}, Cluster("first:8482", 2, 1, "the JAX_* variables")),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "first", "JAX_COORDINATOR_PORT": "6002"}, Cluster("first:6002", 2, 1, "the JAX_* variables")),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "[fe80::1]:99"}, Cluster("[fe80::1]:99", 2, 1, "the JAX_* variables")),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "fe80::1"}, Cluster("[fe80::1]:8482", 2, 1, "the JAX_* variables")),
        (SLURM, Cluster("node003:61441", 3, 1, "SLURM")),
        ({**SLURM, "SLURM_STEP_NODELIST": "alpha,beta7"}, Cluster("alpha:61441", 3, 1, "SLURM")),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "5"},
            Cluster("node003:61441", 16, 1, "SLURM", 5),
        ),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "5"},
            Cluster("node003:61441", 3, 1, "SLURM"),
        ),
        (OPEN_MPI, Cluster("10.96.0.1:62624", 4, 3, "Open MPI", 1)),
        (
            {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::b9b,2620::2]:43370"},
            Cluster("[fe80::b9b]:61441", 4, 3, "Open MPI"),
        ),
        (
            {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "", "JAX_COORDINATOR_ADDRESS": "first:77"},
            Cluster("first:77", 4, 3, "Open MPI and the JAX_* variables", 1),
        ),
        (GKE, Cluster("a.svc:8482", 2, 1, "Cloud TPU")),
        ({**GKE, **SLICES}, Cluster("job-slice-0-0.job:8482", 4, 3, "Cloud TPU")),
        (
            {**POD, "JAX_NUM_PROCESSES": "4"},
            Cluster("job-0.svc.default.svc.cluster.local:8482", 4, 2, "Kubernetes and the JAX_* variables"),
        ),
        (
            {**POD, "JAX_NUM_PROCESSES": "4", "JAX_COORDINATOR_ADDRESS": "set-w-0-0.set"},
            Cluster("set-w-0-0.set:8482", 4, 2, "Kubernetes and the JAX_* variables"),
        ),
        ({**SLURM, **JAX}, Cluster("10.0.0.1:1234", 2, 1, "SLURM and the JAX_* variables")),
    ],
)
def test_processes_are_found(environment, expected):
    """A wrong number or address would make every launcher's run hang until the start-up limit."""
    assert find(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"},  # a shell inside an allocation of eight tasks
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script, without srun
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"TPU_WORKER_HOSTNAMES": "WARNING: could not determine, please set", "TPU_WORKER_ID": "0"},  # libtpu writes this
        {**GKE, "JAX_PLATFORMS": "cpu"},
        {**GKE, "JAX_NUM_PROCESSES": "1"},
        POD,  # an indexed Job whose pods need not be one run
    ],
)
def test_alone(environment):
    """A process that is alone must not wait for others."""
    assert find(environment) is None


@pytest.mark.parametrize(
    "endpoints", ["10.0.0.2,10.0.0.3", "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3", "10.0.0.2:8470,10.0.0.3:8470"]
)
def test_tpu_machines_of_google_cloud_tell_by_metadata(endpoints):
    """The hosts of a TPU slice have nothing in their environment."""
    metadata = {"worker-network-endpoints": endpoints, "agent-worker-number": "1"}
    assert find({}, metadata.get) == Cluster("10.0.0.2:8482", 2, 1, "Cloud TPU")


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {**JAX, "JAX_NUM_PROCESSES": ""},
            r"\(JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID\) .*how many processes there are: set JAX_NUM_PROCESSES",
        ),
        ({**JAX, "JAX_PROCESS_ID": ""}, "not which of them this one is, from 0: set JAX_PROCESS_ID"),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": ""}, "not HOST:PORT of process 0: set JAX_COORDINATOR_ADDRESS"),
        ({"JAX_PROCESS_ID": "1"}, r"\(JAX_PROCESS_ID\) announces several processes but not how many .*: set JAX_NUM_PROCESSES"),
        ({"JAX_NUM_PROCESSES": "2"}, r"\(JAX_NUM_PROCESSES\) .*: set JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "first"}, r"\(JAX_COORDINATOR_ADDRESS\) .*: set JAX_NUM_PROCESSES"),
        ({**POD, "JAX_COORDINATOR_ADDRESS": "first"}, r"\(JAX_COORDINATOR_ADDRESS, JOB_COMPLETION_INDEX\) .*: set JAX_NUM_PROCESSES"),
        ({**POD, "JAX_PROCESS_ID": "1"}, "set JAX_NUM_PROCESSES"),
        (
            {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": ""},
            r"Open MPI \(OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK\) announces several processes but not HOST:PORT of process 0: "
            "set JAX_COORDINATOR_ADDRESS",
        ),
        ({**JAX, "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two', not a number: it must be how many processes there are"),
        ({**JAX, "JAX_NUM_PROCESSES": " "}, "JAX_NUM_PROCESSES is ' ', not a number"),
        ({**JAX, "JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID is 'first', not a number: it must be which of them this one is, from 0"),
        ({**JAX, "JAX_PROCESS_ID": "2"}, "process 2 by JAX_PROCESS_ID, of 2 by JAX_NUM_PROCESSES: they count from 0 to 1"),
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "5"}, "process 5 by JAX_PROCESS_ID, of 1 by JAX_NUM_PROCESSES"),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "host:port"}, "JAX_COORDINATOR_ADDRESS 'host:port' is not HOST:PORT"),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "host:99999"}, "is not HOST:PORT"),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": ":80"}, "is not HOST:PORT"),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "a..b:80"}, "is not HOST:PORT"),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "x" * 64 + ":80"}, "is not HOST:PORT"),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "http://first:80"}, "is not HOST:PORT"),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "host:²"}, "is not HOST:PORT"),
        (
            {**JAX, "JAX_COORDINATOR_ADDRESS": "host", "JAX_COORDINATOR_PORT": "web"},
            "JAX_COORDINATOR_PORT is 'web', not the number",
        ),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "host", "JAX_COORDINATOR_PORT": "0"}, "JAX_COORDINATOR_PORT is '0', not the number of a port"),
        ({**JAX, "JAX_COORDINATOR_BIND_ADDRESS": "host:port"}, "JAX_COORDINATOR_BIND_ADDRESS 'host:port' is not HOST:PORT"),
        ({**JAX, "JAX_NUM_PROCESSES": "²"}, "JAX_NUM_PROCESSES is '²', not a number"),
        ({**JAX, "JAX_NUM_PROCESSES": "-2"}, "JAX_NUM_PROCESSES is '-2', not a number"),
        ({**JAX, "JAX_NUM_PROCESSES": "9" * 5000}, "^JAX_NUM_PROCESSES is '9{39}…, not a number"),
        ({**JAX, "JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES announces 0 processes: a run has 1 to 65,536"),
        ({**JAX, "JAX_NUM_PROCESSES": "1000000000"}, "JAX_NUM_PROCESSES announces 1000000000 processes: a run has 1 to 65,536"),
        ({**GKE, "TPU_WORKER_ID": "first"}, "TPU_WORKER_ID is 'first', not a number: it must be which host of its slice"),
        ({**GKE, "TPU_WORKER_ID": "7"}, "process 7 by TPU_WORKER_ID, of 2 by TPU_WORKER_HOSTNAMES"),
        ({**GKE, "MEGASCALE_NUM_SLICES": "two"}, "MEGASCALE_NUM_SLICES is 'two', not a number"),
        (
            {**GKE, **SLICES, "MEGASCALE_SLICE_ID": "2"},
            "process 5 by TPU_WORKER_ID and MEGASCALE_SLICE_ID, of 4 by TPU_WORKER_HOSTNAMES and MEGASCALE_NUM_SLICES",
        ),
        ({**GKE, **SLICES, "MEGASCALE_COORDINATOR_ADDRESS": "a..b:80"}, "MEGASCALE_COORDINATOR_ADDRESS 'a..b:8482' is not HOST:PORT"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "3(x2)"}, r"SLURM_STEP_NUM_TASKS is '3\(x2\)', not a number: it must be how many"),
        ({**SLURM, "SLURM_PROCID": "3"}, "process 3 by SLURM_PROCID, of 3 by SLURM_STEP_NUM_TASKS"),
        ({**SLURM, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "1"}, "process 1 by JAX_PROCESS_ID, of 1 by JAX_NUM_PROCESSES"),
        ({**SLURM, "SLURM_JOB_ID": "job"}, "SLURM_JOB_ID is 'job', not a number"),
        ({**SLURM, "SLURM_STEP_NODELIST": "[1-4]"}, r"SLURM_STEP_NODELIST is '\[1-4\]', no list of machines"),
        ({**SLURM, "SLURM_STEP_NODELIST": "a..b"}, "SLURM_STEP_NODELIST 'a..b:61441' is not HOST:PORT: .* by JAX_COORDINATOR_ADDRESS"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": ""}, "SLURM_LOCALID is '', not a number: it must be which process"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "x"}, "OMPI_COMM_WORLD_LOCAL_RANK is 'x', not a number"),
        ({**POD, "JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX is 'x', not a number"),
        (
            {name: value for name, value in {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8"}.items() if name != "SLURM_LOCALID"},
            "SLURM_LOCALID is not set: it must be which process of its machine this one is",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(environment, message):
    """A user sees the variable to mend instead of a time-out."""
    with pytest.raises(UserError, match=message):
        find(environment)


@pytest.mark.parametrize(
    "environment, token",
    [
        (JAX, ""),
        ({**JAX, "MAVERICK_RUN_TOKEN": "secret"}, "secret"),
        (SLURM, "SLURM 4097."),
        ({**SLURM, "SLURM_STEP_ID": "2"}, "SLURM 4097.2"),
        ({**SLURM, "MAVERICK_RUN_TOKEN": "secret"}, "secret"),
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "first:77"}, "SLURM 4097."),
        ({**SLURM, **JAX}, ""),  # the user's own numbers may join processes of two jobs
        ({**OPEN_MPI, "OMPI_MCA_ess_base_jobid": "1531576321"}, "1531576321"),
        ({**OPEN_MPI, "PMIX_NAMESPACE": "prterun-host-42@1"}, "prterun-host-42@1"),
        (OPEN_MPI, ""),
        (GKE, ""),
        ({**POD, "JAX_NUM_PROCESSES": "4"}, ""),
    ],
)
def test_the_token_of_a_run(environment, token):
    """The user's, or the number of the launcher's job: two jobs at one port must not take each other's processes."""
    assert find(environment).token == token


def test_a_token_is_not_shown():
    """An error or a log that shows where a process belongs must not show its secret."""
    assert "secret" not in repr(find({**JAX, "MAVERICK_RUN_TOKEN": "secret"}))


@pytest.mark.parametrize("address, bound", [("0.0.0.0:9000", ("0.0.0.0", 9000)), ("[::]:9000", ("::", 9000)), ("eth1", ("eth1", 8482))])
def test_the_user_says_where_process_0_listens(address, bound):
    """By jax's own variable, which jax alone would take to be its service's."""
    found = find({**JAX, "JAX_COORDINATOR_BIND_ADDRESS": address})
    assert (found.bind_host, found.bind_port) == bound


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google Cloud's metadata server, of several minds: the path says which."""

    def do_GET(self):
        self.seen.append((self.path, self.headers["Metadata-Flavor"]))
        if self.path == "/silent":
            self.over.wait(HARD_LIMIT_S)
            return
        if self.path == "/dripping":
            self.wfile.write(b"HTTP/1.0 200 OK\r\nMetadata-Flavor: Google\r\n\r\n")
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.over.wait(0.05)
            return
        if self.path == "/endless":
            self.wfile.write(b"HTTP/1.0 200 OK\r\nMetadata-Flavor: Google\r\n\r\n")
            with contextlib.suppress(OSError):
                for _ in range(2**10):
                    self.wfile.write(bytes(2**16))
                    Metadata.sent += 2**16
            self.over.set()
            return
        if self.path == "/no-http":
            self.wfile.write(b"220 mail.example\r\n")
            return
        size = {"/too-long": cluster.METADATA_BYTES + 1, "/largest": cluster.METADATA_BYTES}.get(self.path, 10)
        flavor = "Portal" if self.path == "/portal" else "Google"
        self.send_response(404 if self.path == "/absent" else 200)
        self.send_header("Metadata-Flavor", flavor)
        self.end_headers()
        self.wfile.write(b"\xff" * 10 if self.path == "/no-text" else b"a" * size)

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(monkeypatch):
    """A metadata server on this machine, which `_ask_machine` asks."""
    Metadata.seen, Metadata.sent, Metadata.over = [], 0, threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        monkeypatch.setattr(cluster, "METADATA", f"http://127.0.0.1:{server.server_port}/")
        yield server
        Metadata.over.set()
        server.shutdown()


def test_the_metadata_server_is_asked_and_understood(metadata, monkeypatch):
    """With the header that it wants, and never through a proxy, which has metadata of its own or none."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert cluster._ask_machine("agent-worker-number") == "a" * 10
    assert Metadata.seen == [("/agent-worker-number", "Google")]
    assert len(cluster._ask_machine("largest")) == cluster.METADATA_BYTES


@pytest.mark.parametrize("name", ["absent", "portal", "too-long", "no-http", "no-text"])
def test_answers_of_the_metadata_server_that_are_none(metadata, name):
    """No such attribute, a login page in between, more than fits, another program: this machine is alone, without a traceback."""
    assert cluster._ask_machine(name) is None


def test_an_endless_answer_of_the_metadata_server_is_not_read(metadata):
    """What is not read fills the buffers of the system, a few megabytes, and no memory of ours."""
    assert cluster._ask_machine("endless") is None
    assert Metadata.over.wait(HARD_LIMIT_S)
    assert Metadata.sent < 2**25


@pytest.mark.parametrize("name", ["silent", "dripping"])
def test_the_metadata_server_has_a_time_limit(metadata, monkeypatch, name):
    """For the whole answer: every command on a machine with a TPU would hang at its start. This ends because the limit holds."""
    assert cluster.METADATA_S <= 10
    monkeypatch.setattr(cluster, "METADATA_S", 0.2)
    assert cluster._ask_machine(name) is None
    assert Metadata.seen == [(f"/{name}", "Google")]


def test_a_name_server_that_never_answers(monkeypatch):
    """A time limit of the connection does not hold for it."""
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(HARD_LIMIT_S) and [])
    monkeypatch.setattr(cluster, "METADATA_S", 0.1)
    assert cluster._ask_machine("agent-worker-number") is None
    over.set()
