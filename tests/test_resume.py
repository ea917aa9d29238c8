"""SIGKILL of the driver at points between the writes of the protocol, then the same command."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import checkpoints
import published
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import ROOT, Head, wait_until
from kills import DECODING, LABELING, PREPARING, WAVE, Kills, fill_with_pictures, label_undisturbed, watched
from servers import Fault, S3Server, put_quickly
from verifier import Place

from pipeline import plan
from pipeline.draw import draw_file
from pipeline.fetch import CONCURRENCY

CRASH_POINTS = (
    "claimed",
    "ranges-sealed",
    "planned",
    "plan-sealed",
    "part-committed",
    "part-committed:2",
    "labeled",
    "publish-sealed",
)
"""Of a first night. The others of a commit are tried on a second one, which has deletions and a catalog before it."""
PUBLISHED_FOLDERS = ("labels", "failures", "deletions", "_catalog", "_log")
SECOND_NIGHT_CRASH_POINTS = {
    "publish-sealed": 0,
    "laid-out": 0,
    "file-published": 1,
    "file-published:2": 2,
    "deletions-published": 3,
    "ranges-renewed": 4,
    "catalog-published": 4,
    "committed": 5,
}
"""And how many of PUBLISHED_FOLDERS hold something of that night by then."""


@pytest.fixture(scope="module")
def source(head: Head, s3: S3Server) -> str:
    """300 objects of which 12 are broken: 5 units."""
    url = s3.create_bucket("resume")
    for index in range(300):
        file = draw_file(3, index, broken_fraction=0.04)
        s3.client.put_object(Bucket=url.removeprefix("s3://"), Key=f"in/{file.path}", Body=file.data)
    return f"{url}/in"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that computes in milliseconds."""
    return str(checkpoints.write_small(tmp_path_factory.mktemp("model")))


def _is_planned(output: str) -> bool:
    """Labeling begins now, and takes the seconds that an actor needs to start."""
    return any(key.endswith("/plan.json") for key in published.keys(output))


@pytest.fixture(scope="module")
def undisturbed(head: Head, source: str, model: str) -> str:
    """The output of a run that nothing happened to."""
    output = f"{source.removesuffix('/in')}/undisturbed"
    done = head.label_bucket("--input", source, "--output", output, "--model", model, "--gpu-actors=1")
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_driver_killed_between_two_writes_leaves_no_process_and_is_resumed_to_identical_rows(
    head: Head, s3: S3Server, source: str, model: str, undisturbed: str, point: str
) -> None:
    output = f"{source.removesuffix('/in')}/{point.replace(':', '-')}"
    options = ("--input", source, "--output", output, "--model", model, "--gpu-actors=1")
    places = [Place(url, s3.client) for url in (source, output, undisturbed)]
    kills = Kills(s3, *places)
    with watched(kills, places[0], places[2], Path(model), head, max_s=200):
        killed = head.label_bucket(*options, crash_at=point)
        wait_until(lambda: not any(map(head.processes, (WAVE, LABELING, PREPARING, DECODING))))
        kills.crashed(killed, num_late=CONCURRENCY if point.startswith("part-committed") else 0)
        parts = published.parts(output)
        assert (len(parts) > 0) == (CRASH_POINTS.index(point) >= CRASH_POINTS.index("part-committed"))
        assert published.entries(output) == []

        finished = head.label_bucket(*options)
        assert finished.returncode == 0, finished.stderr
        now = published.parts(output)
        assert parts.items() <= now.items(), "a finished part was written again"
        assert len(now) == 5
    for kind in ("labels", "failures"):
        assert published.table(output, kind).equals(published.table(undisturbed, kind)), kind
        assert published.table(output, kind).num_rows > 0
    counts = [entry["counts"] for entry in published.entries(output)]
    assert counts[0] == published.entries(undisturbed)[0]["counts"]
    # Where it was publishing, the same command finishes that and plans a night of its own.
    was_publishing = CRASH_POINTS.index(point) >= CRASH_POINTS.index("publish-sealed")
    assert [each["unchanged"] for each in counts] == ([0, 300] if was_publishing else [0])


class SecondNight(NamedTuple):
    """Of 100 objects that were published the night before one is gone, one is another and one is broken."""

    source: Place
    before: Place
    """The output of the first night."""
    undisturbed: Place
    """The output of both nights."""


@pytest.fixture(scope="module")
def second_night(head: Head, s3: S3Server, model: str) -> SecondNight:
    source = fill_with_pictures(s3, "second-night", 100, seed=5)
    before = _copied(label_undisturbed(head, source, Path(model)), f"s3://{source.bucket}/before")
    gone, other, broken = sorted(source.etags())[10::30][:3]
    s3.client.delete_object(Bucket=source.bucket, Key=source.prefix + gone)
    put_quickly(
        s3, source.bucket, {source.prefix + other: draw_file(6, 0).data, source.prefix + broken: b"\xff\xd8\xff"}
    )
    return SecondNight(source, before, label_undisturbed(head, source, Path(model)))


@pytest.mark.slow
@pytest.mark.parametrize("point", SECOND_NIGHT_CRASH_POINTS)
def test_a_driver_killed_while_it_publishes_a_second_night_is_resumed_to_identical_files(
    head: Head, s3: S3Server, model: str, second_night: SecondNight, point: str
) -> None:
    source, before, undisturbed = second_night
    output = _copied(before, f"s3://{source.bucket}/{point.replace(':', '-')}")
    options = ("--input", source.url, "--output", output.url, "--model", model, "--gpu-actors=1")
    kills = Kills(s3, source, output, undisturbed)
    with watched(kills, source, undisturbed, Path(model), head, max_s=200):
        kills.crashed(head.label_bucket(*options, crash_at=point))
        written = {key.split("/")[0] for key in output.etags().keys() - before.etags().keys() if ".claim." not in key}
        assert written == {"_runs", *PUBLISHED_FOLDERS[: SECOND_NIGHT_CRASH_POINTS[point]]}

        finished = head.label_bucket(*options)
        assert finished.returncode == 0, finished.stderr
    assert _published_files(output) == _published_files(undisturbed)
    counts = [entry["counts"] for entry in published.entries(output.url)]
    assert counts[:2] == [entry["counts"] for entry in published.entries(undisturbed.url)]
    assert counts[1] == {"listed": 99, "filtered": 0, "unchanged": 97, "deleted": 1, "labeled": 1, "failed": 1}
    # The same command finishes that night and plans one of its own.
    assert [each["unchanged"] for each in counts] == [0, 97, 99]


def _copied(original: Place, url: str) -> Place:
    """A copy of an output at another place of its store."""
    copy = Place(url, original.client)
    for key in original.etags():
        copy.client.copy_object(
            Bucket=copy.bucket,
            Key=copy.prefix + key,
            CopySource={"Bucket": original.bucket, "Key": original.prefix + key},
        )
    return copy


def _published_files(output: Place) -> dict[tuple[str, str], pa.Table]:
    """Folder and name of every file of rows that a commit names, whatever day is in its path -> its rows."""
    return {
        (key.split("/")[0], key.split("/")[-1]): pq.ParquetFile(io.BytesIO(output.read(key))).read()
        for key in output.etags()
        if key.startswith(("labels/", "failures/", "deletions/", "_catalog/")) and key.endswith(".parquet")
    }


@pytest.mark.slow
def test_another_command_finishes_a_run_that_was_publishing_before_it_plans_its_own(
    head: Head, s3: S3Server, source: str, model: str, undisturbed: str
) -> None:
    output = f"{source.removesuffix('/in')}/finished-by-another"
    options = ("--input", source, "--output", output, "--model", model, "--gpu-actors=1", "--limit=100")
    whole, place, like = (Place(url, s3.client) for url in (source, output, undisturbed))
    kills = Kills(s3, whole, place, like)
    with watched(kills, Place(source, s3.client, first=120), like, Path(model), head, max_s=200):
        kills.crashed(head.label_bucket(*options, crash_at="publish-sealed"))
        assert published.entries(output) == []
        other = head.label_bucket(*options[:-1], "--limit=120")
        assert other.returncode == 0, other.stderr
    first, second = published.entries(output)
    assert first["counts"]["listed"] == 100
    assert [(report["exit_code"], report["counts"]) for report in published.reports(output)] == [
        (0, first["counts"]),
        (0, second["counts"]),
    ]
    assert (second["counts"]["unchanged"], second["counts"]["listed"]) == (100, 120)


@pytest.mark.slow
def test_another_command_is_refused_while_a_run_is_open_until_that_run_is_abandoned(
    head: Head, s3: S3Server, source: str, model: str, undisturbed: str
) -> None:
    output = f"{source.removesuffix('/in')}/abandoned"
    options = ("--input", source, "--output", output, "--model", model, "--gpu-actors=1")
    whole, place, like = (Place(url, s3.client) for url in (source, output, undisturbed))
    kills = Kills(s3, whole, place, like, last_commit=2)
    with watched(kills, Place(source, s3.client, first=80), like, Path(model), head, max_s=200):
        kills.crashed(head.label_bucket(*options, "--limit=70", crash_at="plan-sealed"))
        before = published.keys(output)
        refused = head.label_bucket(*options, "--limit=80")
        assert refused.returncode == 5
        assert "open run 00000001-" in refused.stderr
        assert "limit: that run has 70, this command 80" in refused.stderr
        assert "--abandon-run" in refused.stderr
        assert published.keys(output) == before
        done = head.label_bucket(*options, "--limit=80", "--abandon-run")
        assert done.returncode == 0, done.stderr
    assert [entry["kind"] for entry in published.entries(output)] == ["abandoned", "run"]
    assert published.table(output, "labels").num_rows + published.table(output, "failures").num_rows == 80


@pytest.mark.slow
def test_a_driver_whose_run_was_abandoned_meanwhile_publishes_nothing(
    head: Head, s3: S3Server, source: str, model: str, undisturbed: str
) -> None:
    output = f"{source.removesuffix('/in')}/abandoned-meanwhile"
    options = ("--input", source, "--output", output, "--model", model, "--gpu-actors=1")
    whole, place, like = (Place(url, s3.client) for url in (source, output, undisturbed))
    kills = Kills(s3, whole, place, like, last_commit=2)
    kills.num_read_twice = 80 + 1  # the abandoned run may have read them, too; and the other command's first look
    with (
        watched(kills, Place(source, s3.client, first=80), like, Path(model), head, max_s=200),
        head.start_label_bucket(*options) as alive,
    ):
        wait_until(lambda: alive.poll() is not None or _is_planned(output))
        alive.send_signal(signal.SIGSTOP)
        done = head.label_bucket(*options, "--limit=80", "--abandon-run")
        assert done.returncode == 0, done.stderr
        alive.send_signal(signal.SIGCONT)
        _, printed = alive.communicate(timeout=120)
    assert alive.returncode == 5, printed
    assert "was abandoned by another command" in printed
    assert [entry["kind"] for entry in published.entries(output)] == ["abandoned", "run"]
    uris = published.table(output, "labels")["uri"].to_pylist()
    assert len(uris) == len(set(uris)) == published.entries(output)[1]["counts"]["labeled"]


@pytest.mark.slow
@pytest.mark.parametrize("every_writer_wins", [False, True])
def test_two_live_drivers_of_one_run_that_see_no_sign_of_each_other_end_in_one_exact_result(
    head: Head, s3: S3Server, source: str, model: str, undisturbed: str, faults: list[Fault], every_writer_wins: bool
) -> None:
    output = f"{source.removesuffix('/in')}/two-drivers-{every_writer_wins}"
    options = ["--input", source, "--output", output, "--model", model, "--gpu-actors=1", "--object-deadline-s=120"]
    places = [Place(url, s3.client) for url in (source, output, undisturbed)]
    kills = Kills(s3, *places)
    faults.append(Fault.always(403, "PUT", "/heartbeat.json"))
    faults.append(held := Fault.always(503, "GET", max(places[0].etags())))  # its unit stays in flight
    if every_writer_wins:
        options.append("--single-writer")
        faults += [Fault.always("unconditional", "PUT", suffix) for suffix in (".parquet", ".json")]

    def all_others_are_done() -> bool:
        return kills.staged.look() == 4

    def many_are_read_by_both() -> bool:
        return sum(number > 1 for number in kills.reads().values()) >= 20

    with watched(kills, places[0], places[2], Path(model), head, max_s=200):
        with head.start_label_bucket(*options) as first:
            wait_until(lambda: first.poll() is not None or all_others_are_done())
            with head.start_label_bucket(*options) as second:
                wait_until(lambda: second.poll() is not None or many_are_read_by_both())
                waves = head.processes(WAVE)
                assert kills.staged.look() == 4
                assert kills.num_in_flight() > 20
                assert len(set(waves) & set(head.processes(WAVE))) == 2
                held.times = 0
                printed = [driver.communicate(timeout=120)[1] for driver in (first, second)]
        # The unit is read by both, and the second command, too, reads one object first.
        kills.num_read_twice += plan.RAMP[0][1] + held.num_hits + 1
        assert [first.returncode, second.returncode] == [0, 0], printed
        assert all("no sign of life could be left" in each for each in printed)
        assert not any("waiting for its other driver" in each for each in printed)
    assert len(published.entries(output)) == 1
    for kind in ("labels", "failures"):
        assert published.table(output, kind).equals(published.table(undisturbed, kind)), kind


@pytest.mark.slow
def test_a_narrower_night_deletes_nothing_that_exists_and_forgets_nothing_that_is_out_of_its_scope(
    head: Head, model: str, tmp_path: Path
) -> None:
    images, output = tmp_path / "images", str(tmp_path / "out")
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        path = images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw_file(4, len(name)).data)
    options = ("--input", str(images), "--output", output, "--model", model, "--gpu-actors=1")
    assert head.label_bucket(*options).returncode == 0
    (images / "a/2.png").unlink()
    (images / "b/2.png").unlink()
    for _ in range(2):
        done = head.label_bucket(*options, "--include", "a/**")
        assert done.returncode == 0, done.stderr
    assert head.label_bucket(*options).returncode == 0
    counts = [entry["counts"] for entry in published.entries(output)]
    assert [(each["unchanged"], each["filtered"], each["deleted"]) for each in counts] == [
        (0, 0, 0),
        (1, 1, 0),  # narrower than the night before: says nothing of what is gone
        (1, 1, 1),  # the same scope again: a/2.png is gone
        (2, 0, 0),  # wider again: says nothing of what is gone
    ]


@pytest.mark.slow
def test_a_second_night_with_other_weights_than_the_folder_had_is_a_clear_error(
    head: Head, model: str, tmp_path: Path
) -> None:
    images, output = tmp_path / "images", str(tmp_path / "out")
    images.mkdir()
    (images / "1.png").write_bytes(draw_file(4, 1).data)
    weights = checkpoints.load_weights(Path(model))
    folder = checkpoints.write_small(tmp_path / "model")
    options = ("--input", str(images), "--output", output, "--model", str(folder), "--gpu-actors=1")
    assert head.label_bucket(*options).returncode == 0
    weights.pop(next(iter(weights)))
    checkpoints.save_weights(folder, weights)
    before = published.keys(output)
    broken = head.label_bucket(*options)
    assert broken.returncode == 2, broken.stderr
    assert "expected exactly the tensors" in broken.stderr
    assert "Traceback" not in broken.stderr
    assert published.keys(output) == before


@pytest.mark.slow
def test_a_stopped_driver_says_so_and_the_same_command_resumes(
    head: Head, s3: S3Server, source: str, model: str, undisturbed: str
) -> None:
    output = f"{source.removesuffix('/in')}/stopped"
    options = ("--input", source, "--output", output, "--model", model, "--gpu-actors=1")
    places = [Place(url, s3.client) for url in (source, output, undisturbed)]
    kills = Kills(s3, *places)
    with watched(kills, places[0], places[2], Path(model), head, max_s=200):
        with head.start_label_bucket(*options) as driver:
            wait_until(lambda: driver.poll() is not None or _is_planned(output))
            driver.send_signal(signal.SIGTERM)
            _, printed = driver.communicate(timeout=30)
        assert driver.returncode == 143, printed
        assert "exit code 143: stopped; the same command resumes" in printed
        assert published.reports(output)[0]["exit_code"] == 143
        kills.lose()
        parts = published.parts(output)
        assert len(parts) < 5
        done = head.label_bucket(*options)
        assert done.returncode == 0, done.stderr
        assert parts.items() <= published.parts(output).items()
    assert published.entries(output)[0]["counts"]["listed"] == 300


@pytest.mark.slow
def test_a_run_over_its_failure_budget_publishes_nothing_and_a_larger_budget_continues_it(
    head: Head, model: str, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index in range(60):
        (images / f"{index:03d}.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes([index]) * 100)
    output = str(tmp_path / "out")
    options = ("--input", str(images), "--output", output, "--model", model, "--gpu-actors=1")
    over = head.label_bucket(*options)
    assert over.returncode == 4, over.stderr
    assert "60 of 60 objects failed, 20 are allowed" in over.stderr
    assert published.entries(output) == []
    (told,) = published.reports(output)
    assert told["exit_code"] == 4
    assert b"not published: exit code 4" in published.read(output, f"_runs/{told['run_id']}/report.html")
    parts = published.parts(output)
    done = head.label_bucket(*options, "--max-failed-fraction=1")
    assert done.returncode == 0, done.stderr
    assert published.parts(output) == parts
    assert published.entries(output)[0]["counts"]["failed"] == 60


@pytest.mark.slow
def test_an_error_of_a_worker_ends_the_run_with_its_own_exit_code_and_one_line(
    head: Head, source: str, model: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = ("--input", source, "--output", str(output), "--model", model, "--gpu-actors=1", "--limit=40")
    assert head.label_bucket(*options, crash_at="plan-sealed").returncode == -signal.SIGKILL
    (chunk,) = output.rglob("*.units.parquet")
    chunk.unlink()
    ended = head.label_bucket(*options)
    assert ended.returncode == 3, ended.stderr
    assert f"{chunk.name}: not found" in ended.stderr
    assert "Traceback" not in ended.stderr


STOPPED_IN_A_DESTRUCTOR = """
import os, signal, time
from pipeline import engine

class Resource:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # the handler runs between two instructions of Python
            pass

signal.signal(signal.SIGTERM, engine._stop)
try:
    try:
        Resource()
        time.sleep(20)
    finally:
        try:
            int("x")
        except ValueError:
            time.sleep(1)  # the stop is raised again meanwhile, and must not end the report's writing
            print("cleaned up")
except KeyboardInterrupt:
    print("stopped")
"""


def test_a_stop_that_falls_into_a_destructor_is_not_swallowed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_IN_A_DESTRUCTOR],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == ["cleaned up", "stopped"], done.stderr
