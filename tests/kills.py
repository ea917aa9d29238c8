"""Kills of a run's processes that prove something: some units are done, others are in flight, and the kill hit."""

import contextlib
import io
import itertools
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Protocol

import effort
import pyarrow.parquet as pq
import verifier
from cluster import Head, wait_until
from servers import S3Server, put_quickly
from verifier import Place, Reader

from pipeline.draw import draw_file
from pipeline.fetch import CONCURRENCY

PREPARING, LABELING, WAVE = "ray::MapBatches(", "ray::MapWorker(", "ray::_label_wave"
"""How the titles of workers begin."""
DECODING = "from pipeline import contain"
"""In the command lines of their children."""
MAX_PROCESS_BYTES = 2**30
"""Of any process of the cluster."""


class Machines(Protocol):
    """A head, or a cluster of several nodes."""

    def rss_bytes(self) -> int:
        """Of the largest process."""

    def log_files(self) -> list[Path]:
        """Everything that was logged."""


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
    """The kills of one run over `source`, which nobody else reads meanwhile; `undisturbed` is the output of another."""

    def __init__(
        self, s3: S3Server, source: Place, output: Place, undisturbed: Place, *, last_commit: int | None = None
    ) -> None:
        """`last_commit`: the number of the one that ends it; None: the first one that is made."""
        self.staged = Staged(output)
        self.output = output
        self.counts = Counter[str]()
        self.num_faults = 0
        """Faults that reads of the source met."""
        self.num_read_twice = 0
        """Reads that something else explains."""
        self._num_late = 0
        self.secrets = s3.secrets
        """Of the cluster, which must be found nowhere."""
        number = r"\d+" if last_commit is None else f"{last_commit:08d}"
        self._published = re.compile(rf"/{output.bucket}/{re.escape(output.prefix)}_log/{number}\.json")
        self._s3, self._num_units, self._requests_before = s3, Staged(undisturbed).look(), len(s3.requests)
        self.source_prefix = f"/{source.bucket}/{source.prefix}"
        self._strikes: list[tuple[Set[str], Counter[str]]] = [(frozenset(), Counter())]
        """What was in a part then, and how often each object had been read; the first is the beginning."""

    def reads(self) -> Counter[str]:
        """How often each object was read before the run was published: afterwards its page shows some of them."""
        requests = itertools.takewhile(
            lambda each: each[0] != "PUT" or not self._published.fullmatch(each[1].partition("?")[0]),
            self._s3.requests[self._requests_before :],
        )
        return Counter(
            path.removeprefix(self.source_prefix)
            for method, path in requests
            if method == "GET" and path.startswith(self.source_prefix)
        )

    def wait_for_work(self, poll: Callable[[], int | None], deadline_s: float = 240) -> None:
        """Until a part exists and another unit is in flight, or the driver ends."""
        wait_until(lambda: poll() is not None or (self.staged.look() > 0 and self.num_in_flight() > 0), deadline_s)
        assert poll() is None, "the driver ended before anything could be killed"

    def num_in_flight(self) -> int:
        """Objects that were read since the last strike and are in no part: what was read before may be lost."""
        return len((self.reads() - self._strikes[-1][1]).keys() - self.staged.keys)

    def check_redone(self) -> list[str]:
        """The verifier's findings: nothing was done again but for what was in flight when something struck."""
        marks = [*self._strikes, (frozenset(), self.reads())]
        stretches = [verifier.Stretch(done, after - before) for (done, before), (_, after) in itertools.pairwise(marks)]
        # A command reads one object first, to see whether it may.
        num_explained = self.num_faults + self.num_read_twice + len(stretches) + self._num_late
        return verifier.check_redone(stretches, num_explained)

    def kill(
        self,
        what: str,
        find: Callable[[], list[int]],
        driver: "subprocess.Popen[str]",
        number: signal.Signals = signal.SIGKILL,
    ) -> int:
        """The first process that `find` finds, only while some units are done and others are in flight; gives it."""
        hit: list[int] = []

        def send() -> None:
            while not hit:
                pid = first(find, driver)
                with contextlib.suppress(ProcessLookupError):  # it ended meanwhile: another one
                    os.kill(pid, number)
                    hit.append(pid)
            if number == signal.SIGKILL:
                wait_until(lambda: is_dead(hit[0]), 10)

        self.strike(what, send)
        return hit[0]

    def strike(self, what: str, do: Callable[[], object]) -> None:
        """The same by whatever `do` does."""
        assert 0 < self.staged.look() < self._num_units
        do()
        self.staged.look()
        assert self.num_in_flight() > 0, "nothing was in flight"
        if what != "child":  # a worker knows which image that had
            self.lose()
        self.counts[what] += 1
        if what in ("child", "worker", "actor", "wave", "node", "head", "driver"):
            effort.COUNTS["kills survived"] += 1

    def crashed(self, driver: "subprocess.CompletedProcess[str]", num_late: int = 0) -> None:
        """A driver that was told to die at a crash point did."""
        assert driver.returncode == -signal.SIGKILL, f"the crash point did not fire: {driver.stderr}"
        self.lose(num_late)
        effort.COUNTS["kills survived"] += 1

    def lose(self, num_late: int = CONCURRENCY) -> None:
        """From now on what is in no part may be done again, once. What a process had asked for when it died may reach
        the server a moment later: 0 where none was reading.
        """
        self.staged.look()
        self._num_late += num_late
        self._strikes.append((frozenset(self.staged.keys), self.reads()))


def fill_with_pictures(s3: S3Server, bucket: str, num_objects: int, seed: int) -> Place:
    """A new bucket, whose name begins with `bucket`, with so many drawn pictures below in/, some of them broken: a
    hundred, as often as need be.
    """
    url = s3.create_bucket(bucket)
    files: dict[str, bytes] = {}
    for number in range(100):
        file = draw_file(seed, number, broken_fraction=0.03)
        files |= {f"in/{copy:02d}/{file.path}": file.data for copy in range(num_objects // 100)}
    put_quickly(s3, url.removeprefix("s3://"), files)
    return Place(f"{url}/in", s3.client)


def label_undisturbed(head: Head, source: Place, model: Path) -> Place:
    """The output, beside the source, of a run that met neither fault nor kill."""
    output = Place(f"s3://{source.bucket}/undisturbed", source.client)
    done = head.label_bucket("--input", source.url, "--output", output.url, "--model", str(model), "--gpu-actors=1")
    assert done.returncode == 0, done.stderr
    findings = verifier.check(output, source, exit_code=0)
    assert findings == [], findings
    return output


@contextlib.contextmanager
def watched(
    kills: Kills,
    source: Place,
    undisturbed: Place,
    model: Path,
    machines: Machines,
    max_s: float,
    max_bytes: int = MAX_PROCESS_BYTES,
) -> Iterator[Reader]:
    """A reader looks on at what is done to a run inside; afterwards all nine invariants hold, and it is published."""
    started_s = time.monotonic()
    with Reader(kills.output, machines.rss_bytes) as reader:
        yield reader
    took_s = time.monotonic() - started_s
    findings = [
        *verifier.check(kills.output, source, exit_code=0, like=undisturbed, secrets=kills.secrets),
        *verifier.check_labels(kills.output, source, model, 20),
        *reader.findings,
        *kills.check_redone(),
        *verifier.check_logs(machines.log_files(), kills.secrets),
        *verifier.check_bounds(reader.peak_bytes, took_s, max_bytes=max_bytes, max_s=max_s),
    ]
    assert findings == [], findings
    assert reader.num_polls > 5
    assert reader.peak_bytes > 0


def first(find: Callable[[], list[int]], driver: "subprocess.Popen[str]", deadline_s: float = 300) -> int:
    """The first process that `find` finds, as soon as there is one."""
    found: list[int] = []

    def is_there() -> bool:
        found[:] = find()
        return bool(found) or driver.poll() is not None

    wait_until(is_there, deadline_s)
    assert found, f"the driver ended before there was a process to kill: {driver.communicate()[1][-3000:]}"
    return found[0]


def is_dead(pid: int) -> bool:
    """Whether a process has ended, also where nobody asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
