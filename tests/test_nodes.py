"""Processes and nodes of a cluster of three that die, stop, come late or lose what they need, with units in flight: the
run ends with the rows of an undisturbed one, or says why not, and then the same command does.
"""

import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import checkpoints
import pytest
import verifier
from cluster import Head, Node, files_below, only, running_head, wait_until
from kills import LABELING, PREPARING, WAVE, Kills, fill_with_pictures, first, is_dead, label_undisturbed, watched
from servers import Fault, S3Server, Storm
from verifier import Place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("weather")]

NUM_OBJECTS = 1200
MAX_S = 300
"""From the first command to the end of the last."""


class Cluster(NamedTuple):
    """A head and two nodes, each with one CPU: more would only be more processes on this machine."""

    head: Head
    nodes: list[Node]

    def processes(self, title: str) -> list[int]:
        """Of all nodes, those that joined later as well."""
        found = self.head.processes(title)
        return found + [pid for node in self.nodes for pid in node.processes(title)]

    def rss_bytes(self) -> int:
        """Of the largest process of all nodes."""
        return max(self.head.rss_bytes(), *(each.rss_bytes() for each in self.nodes))

    def log_files(self) -> list[Path]:
        """Of all nodes, which are on one machine."""
        return self.head.log_files()


class Dying(NamedTuple):
    """A cluster whose head dies, and the one that goes on."""

    cluster: Cluster
    logs: Path
    head: Head

    def rss_bytes(self) -> int:
        """Of the largest process of both."""
        return max(self.cluster.rss_bytes(), self.head.rss_bytes())

    def log_files(self) -> list[Path]:
        """Of both."""
        return [*files_below(self.logs), *self.head.log_files()]


@pytest.fixture(scope="module")
def source(s3: S3Server) -> Place:
    """1,200 drawn pictures, some of them broken."""
    return fill_with_pictures(s3, "nodes", NUM_OBJECTS, seed=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_small(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(head: Head, source: Place, model: Path) -> Place:
    """The output of a run on one node that nothing happened to."""
    return label_undisturbed(head, source, model)


@contextmanager
def three_nodes(s3: S3Server) -> Iterator[Cluster]:
    with ExitStack() as stack:
        head = stack.enter_context(running_head({**os.environ, **s3.canary_environment()}, num_cpus=1))
        yield Cluster(head, [stack.enter_context(head.node()) for _ in range(2)])


@pytest.fixture
def cluster(s3: S3Server, slow_reads: None) -> Iterator[Cluster]:
    """For one test: what it lost is lost."""
    with three_nodes(s3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def lasting_cluster(s3: S3Server) -> Iterator[Cluster]:
    """For tests after which all its nodes are there."""
    with three_nodes(s3) as cluster:
        yield cluster


@pytest.fixture
def slow_reads(s3: S3Server) -> None:
    """So that there is time to do harm."""
    s3.storm = Storm(0, {"GET": ["slow"]}, {"GET": 1}, max_per_path=1000)


@pytest.fixture
def kills(s3: S3Server, source: Place, undisturbed: Place, request: pytest.FixtureRequest) -> Kills:
    output = Place(f"s3://{source.bucket}/{request.node.name}", s3.client)
    return Kills(s3, source, output, undisturbed)


def options(source: Place, kills: Kills, model: Path) -> tuple[str, ...]:
    return ("--input", source.url, "--output", kills.output.url, "--model", str(model), "--gpu-actors=2")


def _answers(output: Place) -> dict[str, tuple[list[int], list[float], list[float]]]:
    """To the last bit."""
    rows = verifier.read_rows(output, "labels")
    return {row["uri"]: (row["label_ids"], row["label_scores"], row["embedding"]) for row in rows}


def test_a_worker_an_actor_a_wave_and_a_node_that_die_and_a_node_that_comes_late_change_no_row(
    cluster: Cluster, s3: S3Server, source: Place, model: Path, undisturbed: Place, kills: Kills
) -> None:
    head = cluster.head
    s3.storm = Storm(0, {"GET": ["slow", "stall"]}, {"GET": 0.3}, max_per_path=1000)  # there are four things to kill
    with (
        watched(kills, source, undisturbed, model, cluster, MAX_S),
        head.start_label_bucket(*options(source, kills, model)) as driver,
    ):
        kills.wait_for_work(driver.poll)
        # The driver belongs to any of the nodes, since all are on this machine; with its own it would end.
        others = [each for each in cluster.nodes if not each.processes(WAVE)]
        kills.kill("node", lambda: [each.raylet() for each in others if each.processes(PREPARING)], driver)
        kills.wait_for_work(driver.poll)
        kills.kill("worker", lambda: cluster.processes(PREPARING), driver)
        kills.wait_for_work(driver.poll)
        kills.kill("actor", lambda: cluster.processes(LABELING), driver)
        wait_until(lambda: head.num_cpus() == 2)
        with head.node() as late:
            cluster.nodes.append(late)
            kills.wait_for_work(driver.poll)
            kills.kill("wave", lambda: cluster.processes(WAVE), driver)
            first(lambda: late.processes(PREPARING) + late.processes(LABELING), driver)  # it is given work
            _, printed = driver.communicate(timeout=240)
    assert driver.returncode == 0, printed
    assert set(kills.counts) == {"node", "worker", "actor", "wave"}
    assert _answers(kills.output) == _answers(undisturbed)
    assert "begun again" in printed


def test_a_head_that_dies_ends_the_run_and_the_same_command_finishes_it_on_another(
    cluster: Cluster, head: Head, source: Place, model: Path, undisturbed: Place, kills: Kills
) -> None:
    both = Dying(cluster, cluster.head.log_folder(), head)
    with watched(kills, source, undisturbed, model, both, MAX_S):
        with cluster.head.start_label_bucket(*options(source, kills, model)) as driver:
            kills.wait_for_work(driver.poll)
            kills.kill("head", lambda: [only(cluster.head.processes(""), "gcs_server")], driver)
            _, printed = driver.communicate(timeout=180)
        assert driver.returncode > 0, printed
        assert verifier.check_ending(kills.output, driver.returncode) == []
        assert "Traceback" not in printed
        assert not any(secret in printed for secret in kills.secrets)
        kills.lose()
        assert verifier.entries(kills.output) == []
        done = head.label_bucket(*options(source, kills, model)[:-1], "--gpu-actors=1")
        assert done.returncode == 0, done.stderr


def test_a_job_that_is_stopped_says_so_and_the_same_command_finishes_it(
    head: Head, s3: S3Server, source: Place, model: Path, undisturbed: Place, kills: Kills
) -> None:
    flags = (*options(source, kills, model)[:-1], "--gpu-actors=1")
    with watched(kills, source, undisturbed, model, head, MAX_S):
        s3.storm = Storm(0, {"GET": ["slow", "stall"]}, {"GET": 0.5}, max_per_path=1000)  # the command takes seconds
        name = ("--working-dir", ".", "--submission-id=stopped")
        begun = head.job("submit", "--no-wait", *name, "--", "python", "jobs/label_bucket.py", *flags)
        assert begun.returncode == 0, begun.stdout
        kills.wait_for_work(lambda: None)
        kills.strike("job", lambda: head.job("stop", "stopped"))
        s3.storm = None
        assert "Job 'stopped' was stopped" in head.job("status", "stopped").stdout
        wait_until(lambda: not head.processes(PREPARING) and not head.processes(LABELING))
        assert verifier.check_ending(kills.output, 143) == []
        kills.lose()
        assert verifier.entries(kills.output) == []
        assert "stopped; the same command resumes" in head.job("logs", "stopped").stdout
        done = head.label_bucket(*flags)
        assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("slow_reads")
@pytest.mark.parametrize("title", [PREPARING, LABELING], ids=["worker", "actor"])
def test_a_process_that_stops_for_ever_is_replaced_after_the_stall_timeout(
    lasting_cluster: Cluster, source: Place, model: Path, undisturbed: Place, kills: Kills, title: str
) -> None:
    cluster = lasting_cluster
    # Of two actors, the other one would go on.
    flags = (*options(source, kills, model)[:-1], f"--gpu-actors={1 if title == LABELING else 2}")
    with (
        watched(kills, source, undisturbed, model, cluster, MAX_S),
        cluster.head.start_label_bucket(*flags, "--stall-timeout-s=20") as driver,
    ):
        kills.wait_for_work(driver.poll)
        stopped = kills.kill("stopped", lambda: cluster.processes(title), driver, signal.SIGSTOP)
        assert driver.stderr is not None
        printed = []
        for line in driver.stderr:
            printed.append(line)
            if "nothing moved for 20 s" in line:
                kills.lose()
        driver.wait(10)
    assert driver.returncode == 0, printed
    assert any("nothing moved for 20 s" in line and "begun again" in line for line in printed)
    with suppress(ProcessLookupError):
        os.kill(stopped, signal.SIGKILL)  # the engine often lets it be, and the processor that it has
    wait_until(lambda: is_dead(stopped))


def _vm_bytes(pid: int) -> int:
    """The most address space that a process has had; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmPeak"))


def test_an_actor_that_runs_out_of_memory_goes_on_with_less_at_once_and_says_so(
    s3: S3Server, source: Place, tmp_path: Path
) -> None:
    # Wide and shallow: much memory for little work.
    model = checkpoints.write_checkpoint(
        tmp_path / "model",
        architecture="DeiTForImageClassificationWithTeacher",
        hidden=192,
        num_heads=3,
        num_layers=1,
        input_px=224,
        preprocessor=checkpoints.PUBLISHED[3].preprocessor,
    )
    few = Place(f"{source.url}/00", s3.client)
    plenty, little = (Place(f"s3://{source.bucket}/{name}-memory", s3.client) for name in ("plenty", "little"))
    flags = ("--input", few.url, "--model", str(model), "--gpu-actors=1")
    with running_head({**os.environ, **s3.canary_environment()}) as head:
        needed_bytes = 0
        with head.start_label_bucket(*flags, "--output", plenty.url) as driver:
            while driver.poll() is None:
                needed_bytes = max([needed_bytes, *map(_vm_bytes, head.processes(LABELING))])
                time.sleep(0.1)
        assert driver.returncode == 0
        assert needed_bytes > 0
        # Of every process that the node starts from now on: the others at times need more than they did, too.
        resource.prlimit(only(head.processes(""), "raylet"), resource.RLIMIT_AS, (needed_bytes + 2**30,) * 2)
        # With so many at once as this user wants, an actor may take all that it is allowed.
        with watched(Kills(s3, few, little, plenty), few, plenty, model, head, MAX_S, max_bytes=needed_bytes + 2**30):
            done = head.label_bucket(*flags, "--output", little.url, "--batch-size=1024")
    assert done.returncode == 0, done.stderr
    assert "out of memory with 1024 images per forward pass: going on with 512" in done.stderr


def test_a_checkpoint_that_vanishes_ends_the_run_once_an_actor_needs_it_and_bringing_it_back_resumes(
    lasting_cluster: Cluster,
    source: Place,
    model: Path,
    undisturbed: Place,
    kills: Kills,
    faults: list[Fault],
    tmp_path: Path,
) -> None:
    cluster = lasting_cluster
    moving = tmp_path / "model"
    shutil.copytree(model, moving)
    # Of two actors, the other one may do all the rest.
    flags = (*options(source, kills, moving)[:-1], "--gpu-actors=1", "--object-deadline-s=120")
    faults.append(held := Fault.always(503, "GET", max(source.etags())))  # its unit needs an actor later
    with watched(kills, source, undisturbed, model, cluster, MAX_S):
        with cluster.head.start_label_bucket(*flags) as driver:
            kills.wait_for_work(driver.poll)
            moving.rename(tmp_path / "elsewhere")
            kills.kill("actor", lambda: cluster.processes(LABELING), driver)
            _, printed = driver.communicate(timeout=240)
        assert driver.returncode in (2, 3), printed
        assert verifier.check_ending(kills.output, driver.returncode) == []
        kills.lose()
        assert str(moving) in printed
        assert "Traceback" not in printed
        held.times = 0
        kills.num_read_twice = held.num_hits
        (tmp_path / "elsewhere").rename(moving)
        done = cluster.head.label_bucket(*flags)
        assert done.returncode == 0, done.stderr
