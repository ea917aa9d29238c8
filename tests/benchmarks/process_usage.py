"""What the processes of a session use while they run: CPU time, and the memory of each, sampled from /proc.

A process that has ended keeps the CPU time that was last seen of it, so what it used in its last fraction of a second
is missing; so is a process that lives no longer than that.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster import processes

INTERVAL_S = 0.2
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_SERVICES = (
    *("/gcs/", "/raylet/", "ray/_private/", "ray/dashboard/", "ray/util/", "ray/autoscaler/"),
    *("ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_StatsActor", "ray::_AutoscalingCoordinatorActor"),
    "ray::ActorLocationTracker",
)
"""In the command lines of what Ray runs beside drivers and workers."""
_KINDS = {
    "contain.serve": "children that decode",
    "ray::MapWorker": "actors",
    "ray::_label_wave": "the wave",
    "ray::": "tasks",  # a worker prepares, commits and publishes in turn
}
"""Of our processes, by what is in their command lines."""


@dataclass
class Process:
    """The most that was seen of one process."""

    command: str
    cpu_s: float = 0.0
    peak_rss_bytes: int = 0
    peak_heap_bytes: int = 0
    """Anonymous memory: neither files nor the object store."""


@dataclass
class Usage:
    """Of a session: samples and processes."""

    session: int
    cpu_s: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    """(time.time(), CPU seconds of each process until then, by pid)."""
    peak_heap_bytes: int = 0
    """Of all processes at one moment."""
    processes: dict[int, Process] = field(default_factory=dict)

    def cpu_by_pid_between(self, begin_s: float, end_s: float) -> dict[int, float]:
        """CPU seconds of each process that had begun by then, between two times, interpolated."""
        begin, end = self._cpu_until(begin_s), self._cpu_until(end_s)
        return {pid: cpu_s - begin.get(pid, 0.0) for pid, cpu_s in end.items()}

    def _cpu_until(self, at_s: float) -> dict[int, float]:
        before_s, before = self.cpu_s[0]
        for sample_s, sample in self.cpu_s[1:]:
            if sample_s >= at_s:
                share = (at_s - before_s) / (sample_s - before_s)
                return {
                    pid: before.get(pid, 0.0) + share * (cpu_s - before.get(pid, 0.0)) for pid, cpu_s in sample.items()
                }
            before_s, before = sample_s, sample
        return before

    def driver(self) -> Process:
        """The process that the session began with."""
        return self.processes[self.session]

    def workers(self) -> list[Process]:
        """All others, without Ray's own services."""
        return [each for pid, each in self.processes.items() if pid != self.session and not self._is_service(pid)]

    def kind(self, pid: int) -> str:
        """What a process of ours or of the engine is there for, by its command line."""
        command = self.processes[pid].command
        if pid == self.session:
            return "driver"
        if self._is_service(pid):
            return "the engine's services"
        return next((kind for part, kind in _KINDS.items() if part in command), "others")

    def _is_service(self, pid: int) -> bool:
        return any(part in self.processes[pid].command for part in _SERVICES)

    def sample(self) -> None:
        """Look once."""
        heap_bytes = 0
        for pid in processes(self.session, ""):
            with contextlib.suppress(OSError, KeyError):  # it ended meanwhile
                folder = Path(f"/proc/{pid}")
                process = self.processes.setdefault(pid, Process(""))
                # A worker renames itself when it knows what it does, and once more when it does nothing.
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command and not command.startswith("ray::IDLE"):  # none: it is ending
                    process.command = command
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                process.cpu_s = (int(fields[11]) + int(fields[12])) * _TICK_S
                status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
                heap = int(status["RssAnon"].split()[0]) << 10
                process.peak_heap_bytes = max(process.peak_heap_bytes, heap)
                process.peak_rss_bytes = max(process.peak_rss_bytes, int(status["VmHWM"].split()[0]) << 10)
                heap_bytes += heap
        self.peak_heap_bytes = max(self.peak_heap_bytes, heap_bytes)
        self.cpu_s.append((time.time(), {pid: each.cpu_s for pid, each in self.processes.items()}))


@contextlib.contextmanager
def watched(session: int) -> Iterator[Usage]:
    """Sample a session every INTERVAL_S from a thread, until the block ends."""
    usage, is_over = Usage(session, [(time.time(), {})]), threading.Event()

    def watch() -> None:
        while not is_over.wait(INTERVAL_S):
            usage.sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield usage
    finally:
        is_over.set()
        thread.join()
