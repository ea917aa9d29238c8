"""Kills of a run's processes that prove something: some units are done, others are in flight, and the kill hit."""

import io
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import effort
import pyarrow.parquet as pq
from cluster import wait_until
from servers import S3Server
from verifier import Place

PREPARING, LABELING, WAVE = "ray::MapBatches(", "ray::MapWorker(", "ray::_label_wave"
"""How the titles of workers begin."""


class Staged:
    """What is committed so far: the keys in staged parts, each part read once."""

    def __init__(self, output: Place) -> None:
        self._output = output
        self.etags: dict[str, str] = {}
        self.keys: set[str] = set()

    def look(self) -> int:
        """The number of parts. A part that was there must still be the same."""
        found = {key: etag for key, etag in self._output.etags("_runs/").items() if "/parts/" in key}
        assert self.etags.items() <= found.items(), "a finished part was written again"
        for key in found.keys() - self.etags.keys():
            self.keys |= set(pq.ParquetFile(io.BytesIO(self._output.read(key))).read(["key"])["key"].to_pylist())
        self.etags = found
        return len(found)


class Kills:
    """The kills of one run of `num_units` units over `source`, which nobody else reads meanwhile."""

    def __init__(self, s3: S3Server, source: Place, output: Place, num_units: int) -> None:
        self.staged = Staged(output)
        self.output = output
        self.counts = Counter[str]()
        self.num_in_flight = 0
        """Objects that had been read and were in no part, summed over all kills."""
        self._s3, self._num_units, self._requests_before = s3, num_units, len(s3.requests)
        self._prefix = f"/{source.bucket}/{source.prefix}"

    def reads(self) -> Counter[str]:
        """How often each object was read."""
        return Counter(
            path.removeprefix(self._prefix)
            for method, path in self._s3.requests[self._requests_before :]
            if method == "GET" and path.startswith(self._prefix)
        )

    def wait_for_work(self, poll: Callable[[], int | None], deadline_s: float = 240) -> None:
        """Until a part exists and another unit is in flight, or the driver ends."""
        wait_until(lambda: poll() is not None or (self.staged.look() > 0 and self._is_in_flight()), deadline_s)
        assert poll() is None, "the driver ended before anything could be killed"

    def _is_in_flight(self) -> bool:
        return bool(self.reads().keys() - self.staged.keys)

    def kill(self, what: str, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Only while some units are done and others are in flight; it must have hit."""
        assert 0 < self.staged.look() < self._num_units
        os.kill(pid, number)
        if number == signal.SIGKILL:
            wait_until(lambda: is_dead(pid), 10)
        assert self.lose(), "nothing was in flight"
        self.counts[what] += 1
        effort.COUNTS["kills survived"] += 1

    def lose(self) -> int:
        """Count what is in flight now, because it will be done again."""
        self.staged.look()
        num_lost = len(self.reads().keys() - self.staged.keys)
        self.num_in_flight += num_lost
        return num_lost


def is_dead(pid: int) -> bool:
    """Whether a process has ended, also where nobody asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
