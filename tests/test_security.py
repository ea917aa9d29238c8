"""Secrets stay in the workers' environment; keys are data, whatever stands in them."""

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import checkpoints
import published
import pytest
import verifier
from cluster import Head
from kills import LABELING, PREPARING
from servers import S3Server
from verifier import Place

from pipeline import sheet
from pipeline.draw import draw_file
from pipeline.sheet import Section, Tile

LONGEST_KEY = "x" * 200 + "/" + "y" * 809 + ".png"  # 1024 bytes, as many as S3 takes, below in/broken/
ODD_KEYS = (
    *("semi;colon.png", "equals=sign/run_date=2020-01-01.png", "percent%2Fsign%.png", "a b+c.png"),
    *("<script>alert(1)</script>.png", "\"quoted\" 'twice'.png", "\u202egnp.lrtl.png", "ümlaut/é\u0301.png"),
    *("tab\t.png", "back\\slash.png", "a//b/../c.png", LONGEST_KEY, "=cmd|'/C calc'!A0.png"),
)
API = (
    "api/jobs/",
    *(f"api/v0/{what}?detail=True&limit=1000" for what in ("workers", "tasks", "actors", "runtime_envs")),
)


@pytest.fixture(scope="module")
def source(s3: S3Server) -> Place:
    """A picture and a broken file under every odd key."""
    place = Place(f"{s3.create_bucket('odd')}/in", s3.client)
    for number, key in enumerate(ODD_KEYS):
        s3.client.put_object(Bucket=place.bucket, Key=f"in/{key}", Body=draw_file(9, number).data)
        s3.client.put_object(
            Bucket=place.bucket, Key=f"in/broken/{key}", Body=b"\xff\xd8\xff\xe0" + bytes([number]) * 40
        )
    return place


@dataclass
class Job:
    """What a submitted job left: its output, all that it printed, and every command line of the machine meanwhile."""

    output: Place
    printed: str
    command_lines: set[bytes]


@pytest.fixture(scope="module")
def job(head: Head, s3: S3Server, source: Place, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """One over all odd keys."""
    model = checkpoints.write_small(tmp_path_factory.mktemp("model"))
    place = Place(f"s3://{source.bucket}/out", s3.client)
    command = ["python", "jobs/label_bucket.py", "--input", source.url, "--output", place.url, "--model", str(model)]
    with watched_command_lines() as seen:
        done = head.submit("--", *command, "--gpu-actors=1", "--log-level=DEBUG")
    assert done.returncode == 0, done.stdout[-3000:]
    return Job(place, done.stdout + done.stderr, seen)


@contextmanager
def watched_command_lines() -> Iterator[set[bytes]]:
    """Those of all processes while the block runs: a job's driver is in no session of the cluster's."""
    seen: set[bytes] = set()
    is_over = Event()

    def watch() -> None:
        while not is_over.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # it ended meanwhile
                    seen.add(path.read_bytes())

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        is_over.set()
        watcher.join()


def said_by_ray(head: Head) -> str:
    """Everything that the cluster tells about its jobs, workers, tasks and actors, and their environments."""
    texts = []
    for path in API:
        headers = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(urllib.request.Request(f"{head.dashboard_url}/{path}", headers=headers)) as answer:
            texts.append(answer.read().decode())
    return "\n".join(texts)


def test_the_secrets_of_the_workers_stand_nowhere_but_in_their_environment(head: Head, s3: S3Server, job: Job) -> None:
    # A worker writes its title over its environment; the raylet that gives it that does not.
    environments = [(Path("/proc") / str(pid) / "environ").read_bytes() for pid in head.processes("")]
    for begin in (b"python\0jobs/label_bucket.py\0", PREPARING.encode(), LABELING.encode()):
        assert any(line.startswith(begin) for line in job.command_lines), f"{begin!r} was not seen"
    assert verifier.check_secrets(job.output, s3.secrets) == []
    said = said_by_ray(head)
    logs = head.log_files()
    assert len(logs) > 10
    assert verifier.check_logs(logs, s3.secrets) == []
    for secret in s3.secrets:
        assert any(secret.encode() in each for each in environments), "the secret is not there, so nothing was tested"
        assert secret not in job.printed
        assert [line for line in job.command_lines if secret.encode() in line] == []
        assert secret not in said


def test_a_secret_in_a_jobs_runtime_environment_would_be_found(head: Head) -> None:
    """The control: what the README warns of is visible to whoever may ask the cluster."""
    careless = json.dumps({"env_vars": {"AWS_SECRET_ACCESS_KEY": "canary-of-somebody-careless"}})
    done = head.submit("--runtime-env-json", careless, "--", "python", "-c", "print('canary-that' + '-was-printed')")
    assert done.returncode == 0, done.stdout
    assert "canary-of-somebody-careless" in said_by_ray(head)
    assert verifier.check_logs(head.log_files(), ["canary-that-was-printed"]) != []


def test_odd_keys_reach_the_tables_byte_for_byte(source: Place, job: Job) -> None:
    assert verifier.check(job.output, source, exit_code=0) == []
    labels, failures = (verifier.read_rows(job.output, table) for table in ("labels", "failures"))
    assert {row["uri"] for row in labels} == {f"{source.url}/{key}" for key in ODD_KEYS}
    assert {row["uri"] for row in failures} == {f"{source.url}/broken/{key}" for key in ODD_KEYS}
    assert {"\n" in row["failure_message"] for row in failures} == {False}


@pytest.mark.slow
def test_names_with_line_breaks_reach_the_tables_and_the_page_of_a_run(head: Head, tmp_path: Path) -> None:
    """Of a folder: the test server answers 404 to such a key."""
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    names = ("a\nb.png", "a\r\nb.png", "\u2028<script>.png", "e\u0301.png", "\u00e9.png")
    for number, name in enumerate(names):
        (images / name).write_bytes(draw_file(9, number).data)
    model = str(checkpoints.write_small(tmp_path / "model"))
    done = head.label_bucket("--input", str(images), "--output", str(output), "--model", model, "--gpu-actors=1")
    assert done.returncode == 0, done.stderr
    assert sorted(published.table(str(output), "labels")["uri"].to_pylist()) == sorted(
        f"file://{images}/{name}" for name in names
    )
    (page,) = output.glob("_runs/*/report.html")
    html = page.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;.png" in html


def test_odd_keys_are_text_in_a_page_of_them(job: Job) -> None:
    rows = verifier.read_rows(job.output, "labels")
    page = sheet.write("found", [Section("all", "", [Tile(row["uri"], None, "not fetched") for row in rows])])
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\u202e" not in page
