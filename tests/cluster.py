"""A real Ray head in its own processes, and the real command against it.

One head serves the whole test session, because starting one takes 10 to 20 s. It is started after the S3 server, so
that its workers have that server's address in their environment, and ended by its process group, never by name.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
JOB = ROOT / "jobs" / "label_bucket.py"
_START_DEADLINE_S = 120


@dataclass(frozen=True)
class Node:
    """Another node of a cluster, in a session of its own."""

    session: int

    def processes(self, title: str) -> list[int]:
        """Processes of this node whose command line holds `title`."""
        return processes(self.session, title)

    def rss_bytes(self) -> int:
        """Of its largest process."""
        return max((_rss_bytes(pid) for pid in self.processes("")), default=0)

    def raylet(self) -> int:
        """The process that is the node: without it the others end, and the cluster counts it as dead."""
        return only(self.processes(""), "raylet")


@dataclass(frozen=True, kw_only=True)
class Head:
    """Where a head listens, and the environment in which commands find it."""

    address: str
    dashboard_url: str
    metrics_url: str
    """What Prometheus scrapes of the head's own node."""
    environment: dict[str, str]
    session: int
    """That of every process it started."""
    drivers: list[int] = field(default_factory=list)
    """Commands that run now, which others started."""

    def processes(self, title: str) -> list[int]:
        """Processes of this head whose command line holds `title`: Ray writes there what a worker does."""
        return processes(self.session, title)

    def rss_bytes(self) -> int:
        """Of its largest process or driver."""
        return max((_rss_bytes(pid) for pid in (*self.processes(""), *self.drivers)), default=0)

    def command_lines(self) -> str:
        """Of every process."""
        texts = []
        for pid in self.processes(""):
            with contextlib.suppress(OSError):  # it ended meanwhile
                texts.append((Path("/proc") / str(pid) / "cmdline").read_text())
        return "\n".join(texts)

    def log_folder(self) -> Path:
        """Of the cluster and its workers."""
        words = self.command_lines().split("\0")
        (session,) = {word.partition("=")[2] for word in words if word.startswith("--session-dir=/tmp/ray/")}
        return Path(session) / "logs"

    def log_files(self) -> list[Path]:
        """Everything that the cluster and its workers logged."""
        return files_below(self.log_folder())

    def label_bucket(self, *arguments: str, crash_at: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run `python jobs/label_bucket.py` to its end as a driver of this head."""
        with self.start_label_bucket(*arguments, crash_at=crash_at) as driver:
            printed, complaints = driver.communicate(timeout=240)
        return subprocess.CompletedProcess(driver.args, driver.returncode, printed, complaints)

    def compact_labels(self, *arguments: str, crash_at: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run `python jobs/compact_labels.py` to its end as a driver of this head."""
        environment = {**self.environment, "RAY_ADDRESS": self.address}
        if crash_at is not None:
            environment["LABEL_BUCKET_CRASH_AT"] = crash_at
        return subprocess.run(
            [sys.executable, str(JOB.with_name("compact_labels.py")), *arguments],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    @contextmanager
    def start_label_bucket(self, *arguments: str, crash_at: str | None = None) -> "Iterator[subprocess.Popen[str]]":
        """`python jobs/label_bucket.py` as a driver of this head, running; killed at the end if it still is."""
        environment = {**self.environment, "RAY_ADDRESS": self.address}
        if crash_at is not None:
            environment["LABEL_BUCKET_CRASH_AT"] = crash_at
        driver = subprocess.Popen(
            [sys.executable, str(JOB), *arguments],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.drivers.append(driver.pid)
        with driver:
            try:
                yield driver
            finally:
                driver.kill()
                self.drivers.remove(driver.pid)

    @contextmanager
    def node(self, *, num_cpus: int = 1) -> Iterator[Node]:
        """Another node, on this machine, which has joined. One at a time: two at once stop each other now and then."""
        num_cpus_before = self.num_cpus()
        (agent_port,) = _free_ports(1)
        command = [
            str(Path(sys.executable).with_name("ray")),
            *("start", f"--address={self.address}", "--block", "--disable-usage-stats", f"--num-cpus={num_cpus}"),
            *("--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent_port}"),
            "--object-store-memory=300000000",
        ]
        process = subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(lambda: self.num_cpus() > num_cpus_before)
            yield Node(process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def num_cpus(self) -> float:
        """What the cluster has now, of all nodes that live."""
        from ray.util import state  # only now: see pytest_configure

        nodes = state.list_nodes(self.dashboard_url)
        return sum(float((each.resources_total or {}).get("CPU", 0)) for each in nodes if each.state == "ALIVE")

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `ray job submit --working-dir . …` from the checkout and follow the job to its end."""
        return self.job("submit", "--working-dir", ".", *arguments)

    def job(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `ray job COMMAND …` from the checkout to its end."""
        ray = str(Path(sys.executable).with_name("ray"))
        return subprocess.run(
            [ray, "job", command, "--address", self.dashboard_url, *arguments],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    def pid_of(self, title: str) -> int:
        """The only process whose command line holds `title`, once there is one."""
        found: list[int] = []

        def is_there() -> bool:
            found[:] = self.processes(title)
            return len(found) == 1

        wait_until(is_there)
        return found[0]


@contextmanager
def running_head(environment: Mapping[str, str], *, num_cpus: int = 2) -> Iterator[Head]:
    """Start a head whose workers get `environment`, token included, and end it with everything it started."""
    gcs_port, dashboard_port, client_port, agent_port, metrics_port = _free_ports(5)
    full = {
        **environment,
        # A job's `python` is the first one on the head's PATH.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        str(Path(sys.executable).with_name("ray")),
        *("start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={num_cpus}"),
        *("--node-ip-address=127.0.0.1", f"--port={gcs_port}", "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={client_port}"),
        *(f"--dashboard-agent-listen-port={agent_port}", "--object-store-memory=1000000000"),
        f"--metrics-export-port={metrics_port}",
    ]
    head = subprocess.Popen(
        command, env=full, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        url = f"http://127.0.0.1:{dashboard_port}"
        _wait_until_answering(head, f"{url}/api/jobs/", environment["RAY_AUTH_TOKEN"])
        yield Head(
            address=f"127.0.0.1:{gcs_port}",
            dashboard_url=url,
            metrics_url=f"http://127.0.0.1:{metrics_port}/metrics",
            environment=full,
            session=head.pid,
        )
    finally:
        # Its session holds every process that it started; there is nothing in it to keep.
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def wait_until(is_true: Callable[[], bool], deadline_s: float = 120) -> None:
    """Wait for a condition; TimeoutError at the deadline."""
    deadline = time.monotonic() + deadline_s
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition did not hold within {deadline_s} s")
        time.sleep(0.05)


def processes(session: int, title: str) -> list[int]:
    """Running processes of a session whose command line holds `title`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):  # it ended meanwhile
                state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its_session) == session and state not in "ZX":
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if title in command:
                        found.append(int(folder.name))
    return found


def files_below(folder: Path) -> list[Path]:
    """All of them, at any depth."""
    return [path for path in folder.rglob("*") if path.is_file()]


def only(pids: Sequence[int], program: str) -> int:
    """The one process that runs `program`."""
    (pid,) = [pid for pid in pids if Path(f"/proc/{pid}/exe").resolve().name == program]
    return pid


def _rss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int((Path("/proc") / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _wait_until_answering(head: "subprocess.Popen[str]", url: str, token: str) -> None:
    deadline = time.monotonic() + _START_DEADLINE_S
    while time.monotonic() < deadline:
        if head.poll() is not None:
            raise RuntimeError(f"ray start ended with {head.returncode}: {head.communicate()[1][-2000:]}")
        try:
            urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"}), timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise TimeoutError(f"{url} did not answer within {_START_DEADLINE_S} s")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
