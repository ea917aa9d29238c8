"""Kills and faults together: a run that is killed 25 times and more, on storage that fails all the time, publishes the
rows of an undisturbed one. That the verifier would find what is wrong is shown in test_verifier.py.
"""

import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import checkpoints
import pytest
import verifier
from cluster import Head, wait_until
from kills import DECODING, LABELING, PREPARING, Kills, fill_with_pictures, label_undisturbed, watched
from servers import Kind, S3Server, Storm
from test_faults import GET_KINDS, LIST_KINDS, PUT_KINDS
from verifier import Place

pytestmark = pytest.mark.usefixtures("weather")
NUM_OBJECTS = 1600
MIN_KILLS, MIN_FAULTS = 25, 200
SEED = 20261125
NUM_ASKING = 5
"""Processes that ask a store at once on two cores: the driver, two tasks that prepare and two that commit."""


@pytest.fixture(scope="module")
def source(s3: S3Server) -> Place:
    """1,600 drawn pictures, some of them broken."""
    return fill_with_pictures(s3, "once", NUM_OBJECTS, seed=11)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_small(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(head: Head, source: Place, model: Path) -> Place:
    """The output of a run that met neither fault nor kill."""
    output = label_undisturbed(head, source, model)
    assert verifier.check_labels(output, source, model, 40) == []
    return output


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_and_meets_faults_all_the_time_publishes_the_rows_of_an_undisturbed_one(
    head: Head, s3: S3Server, source: Place, model: Path, undisturbed: Place
) -> None:
    output = Place(f"s3://{source.bucket}/disturbed", s3.client)
    options = ("--input", source.url, "--output", output.url, "--model", str(model), "--gpu-actors=1")
    kinds = {"GET": GET_KINDS, "PUT": PUT_KINDS, "LIST": LIST_KINDS}
    probability, path = {"GET": 0.1, "PUT": 0.4, "LIST": 0.4}, re.compile(f"/{source.bucket}($|/(in|disturbed)/)")
    storm = Storm(SEED, kinds, probability, path, max_lists=1000)
    kills = Kills(s3, source, output, undisturbed)

    s3.storm = storm
    with watched(kills, source, undisturbed, model, head, max_s=1500) as reader:
        for victims in _plan():
            with head.start_label_bucket(*options, "--object-deadline-s=6") as driver:
                last = 0
                for what, title in victims:
                    kills.wait_for_work(driver.poll, 600)
                    find = partial(_victims, driver, head, title, last)
                    last = kills.kill(what, find, driver)
                if "driver" not in dict(victims):
                    _, printed = driver.communicate(timeout=300)
                    assert driver.returncode == 0, printed[-3000:]
                else:
                    driver.wait(10)
        s3.storm = None
        by_operation = Counter[str]()
        for (operation, _), number in storm.num_hits.items():
            by_operation[operation] += number
        kills.num_faults = storm.num_met("GET", kills.source_prefix)
    num_reads = sum(kills.reads().values())
    print(f"kills {dict(kills.counts)}, faults {dict(by_operation)}, {reader.num_polls} polls,")
    print(f"{num_reads} reads of {NUM_OBJECTS}, peak {reader.peak_bytes:,}")

    assert sum(kills.counts.values()) >= MIN_KILLS
    assert min(kills.counts.values()) >= 5
    assert by_operation.total() >= MIN_FAULTS
    assert {*product(["GET"], GET_KINDS), *product(["PUT"], PUT_KINDS)} <= storm.num_hits.keys()
    assert by_operation["LIST"] >= 3  # there are few: each kind is tried in test_faults.py


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [503, "hang"])
def test_an_endless_outage_ends_the_run_in_bounded_time_and_the_same_command_finishes_it_afterwards(
    head: Head, s3: S3Server, source: Place, model: Path, undisturbed: Place, kind: Kind
) -> None:
    output = Place(f"s3://{source.bucket}/outage-{kind}", s3.client)
    options = ("--input", source.url, "--output", output.url, "--model", str(model), "--gpu-actors=1")
    kills = Kills(s3, source, output, undisturbed)
    every = ("GET", "PUT", "LIST", "HEAD", "POST", "DELETE")
    outage = Storm(SEED, {operation: [kind] for operation in every}, dict.fromkeys(every, 1), max_per_path=10**6)
    with watched(kills, source, undisturbed, model, head, max_s=400):
        with head.start_label_bucket(*options, "--object-deadline-s=6") as driver:
            kills.wait_for_work(driver.poll)
            s3.storm, began_s, num_before = outage, time.monotonic(), len(s3.requests)
            try:
                _, printed = driver.communicate(timeout=300)
                took_s = time.monotonic() - began_s
                # Or a worker that outlives the driver for a moment could still commit what met the outage.
                wait_until(lambda: not head.processes(PREPARING))
            finally:
                s3.storm = None
        num_asked = len(s3.requests) - num_before
        print(f"{kind}: ended after {took_s:.0f} s and {num_asked} requests")
        assert driver.returncode == 3, printed[-3000:]
        assert "Traceback" not in printed
        assert not any(secret in printed for secret in s3.secrets)
        assert sum(outage.num_hits.values()) >= 10
        assert took_s < 150
        assert num_asked <= 5 * took_s * NUM_ASKING
        assert verifier.entries(output) == []
        assert verifier.check_ending(output, driver.returncode) == []
        kills.lose()
        kills.num_faults = outage.num_met("GET", kills.source_prefix)
        reads_before = kills.reads()
        done = head.label_bucket(*options)
        assert done.returncode == 0, done.stderr
        assert kills.staged.look()
        again = kills.reads() - reads_before
        # Each once, but for the one that a command reads first to see whether it may.
        assert again.total() - len(again) <= 1


def _plan() -> Iterator[list[tuple[str, str]]]:
    """For each start of the driver, what is killed, and in the end nothing that ends it."""
    child, worker, actor, driver = ("child", DECODING), ("worker", PREPARING), ("actor", LABELING), ("driver", "")
    for _ in range(5):
        yield [worker, child, actor, worker, driver]
    yield [worker, actor]


def _victims(driver: "subprocess.Popen[str]", head: Head, title: str, last: int) -> list[int]:
    """The driver, or the processes with this title but for the one that was killed last."""
    return [pid for pid in head.processes(title) if pid != last] if title else [driver.pid]
