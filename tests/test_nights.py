"""Night after night on a real server: what is labeled, what is left alone, what is gone, and who may run at once."""

import io
import itertools
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import boto3
import checkpoints
import numpy as np
import published
import pytest
import ray
from cluster import ROOT, Head, wait_until
from kills import Kills, fill_with_pictures, label_undisturbed, watched
from PIL import Image
from servers import S3Server
from verifier import Place

from pipeline import catalog, listing, storage, store, verify, view
from pipeline.draw import draw_file
from pipeline.errors import SourceError
from pipeline.options import load_config
from pipeline.run import label_bucket

NUM_OBJECTS = 5000
MAX_S = 200
"""From the first command to the end of the last, where something strikes."""
GARBAGE = b"\xff\xd8\xff\xe0 no picture follows"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that computes in milliseconds."""
    return str(checkpoints.write_small(tmp_path_factory.mktemp("model")))


def picture(number: int) -> bytes:
    """A small JPEG, another one for every number."""
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((48, 48)).save(sink, "JPEG")
    return sink.getvalue()


def put(bucket: str, objects: dict[str, bytes]) -> None:
    client = boto3.client("s3")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: client.put_object(Bucket=bucket, Key=item[0], Body=item[1]), objects.items()))


def uris(output: str, kind: str, run_seq: int) -> set[str]:
    table = published.table(output, kind)
    rows = table.to_pylist() if table.num_rows else []
    found = [row["uri"] for row in rows if row["run_seq"] == run_seq]
    assert len(found) == len(set(found))
    return set(found)


def num_actors(head: Head) -> int:
    """Actors that the head has ever started."""
    code = "from ray.util.state import list_actors; print(len(list_actors(limit=10_000)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**head.environment, "RAY_ADDRESS": head.address},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_three_nights_over_5000_objects_label_exactly_what_is_new_changed_or_may_pass(
    head: Head, s3: S3Server, model: str
) -> None:
    client, root = boto3.client("s3"), s3.create_bucket("nights")
    bucket = root.removeprefix("s3://")
    keys = [f"in/{number // 1000}/{number:05d}.jpg" for number in range(NUM_OBJECTS)]
    broken = keys[100:120]
    put(bucket, {key: GARBAGE if key in broken else picture(number) for number, key in enumerate(keys)})
    source, output = f"{root}/in", f"{root}/out"
    options = ("--input", source, "--output", output, "--model", model, "--gpu-actors=1")

    def uri(key: str) -> str:
        return f"{root}/{key}"

    # An object that changes between listing and reading fails in a way that may pass.
    assert head.label_bucket(*options, crash_at="plan-sealed").returncode == -signal.SIGKILL
    put(bucket, {keys[4000]: picture(9999)})
    first = head.label_bucket(*options)
    assert first.returncode == 0, first.stderr
    assert published.entries(output)[0]["failures"] == {"changed": 1, "truncated": 20}
    assert published.entries(output)[0]["counts"]["labeled"] == NUM_OBJECTS - 21

    new = [f"in/new {number:03d}.jpg" for number in range(100)]
    overwritten, deleted = keys[1000:1050], keys[2000:2030]
    put(bucket, {key: picture(10_000 + number) for number, key in enumerate([*new, *overwritten, *broken])})
    client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in deleted]})
    second = head.label_bucket(*options)
    assert second.returncode == 0, second.stderr
    to_do = {uri(key) for key in [*new, *overwritten, *broken, keys[4000]]}
    assert len(to_do) == 171
    assert uris(output, "labels", 2) == to_do
    assert uris(output, "deletions", 2) == {uri(key) for key in deleted}
    assert published.entries(output)[1]["counts"] == {
        "listed": NUM_OBJECTS + 100 - 30,
        "filtered": 0,
        "unchanged": NUM_OBJECTS - 30 - 50 - 20 - 1,
        "deleted": 30,
        "labeled": 171,
        "failed": 0,
    }

    live = {uri(key) for key in [*keys, *new]} - {uri(key) for key in deleted}
    current = [row for table in view.batches(storage.connect(output)) for row in table.to_pylist()]
    assert len(current) == len({row["uri"] for row in current}) == NUM_OBJECTS + 70
    assert {row["uri"]: row["run_seq"] for row in current} == {each: 2 if each in to_do else 1 for each in live}
    checks = verify.verify(verify.Audit(output_url=output, num_sample_rows=0), itertools.starmap)
    assert {check.status for check in checks} <= {"ok", "skipped"}, verify.summary(checks)

    num_actors_before, before = num_actors(head), published.keys(output)
    third = head.label_bucket(*options)
    assert third.returncode == 0, third.stderr
    assert num_actors(head) == num_actors_before
    report = published.reports(output)[2]
    assert (report["num_units"], report["stage_s"], report["counts"]["unchanged"]) == (0, {}, NUM_OBJECTS + 70)
    entries = published.entries(output)
    assert entries[2]["catalog"] == entries[1]["catalog"]
    written = {key.split("/")[0] for key in published.keys(output).keys() - before.keys()}
    assert written == {"_log", "_runs"}


@pytest.mark.slow
def test_failures_are_tried_again_and_everything_is_labeled_anew_when_asked(
    head: Head, model: str, tmp_path: Path
) -> None:
    images, output = tmp_path / "images", str(tmp_path / "out")
    images.mkdir()
    for number in range(6):
        (images / f"{number}.jpg").write_bytes(picture(number) if number else GARBAGE)
    options = ("--input", str(images), "--output", output, "--model", model, "--gpu-actors=1")
    for extra in ([], ["--retry-failed"], ["--full"], []):
        done = head.label_bucket(*options, *extra)
        assert done.returncode == 0, done.stderr
    counts = [
        (each["counts"]["labeled"], each["counts"]["failed"], each["counts"]["unchanged"])
        for each in published.entries(output)
    ]
    assert counts == [(5, 1, 0), (0, 1, 5), (5, 1, 0), (0, 0, 6)]


@pytest.mark.slow
def test_an_empty_bucket_deletes_everything_only_if_that_was_said(
    head: Head, s3: S3Server, model: str, tmp_path: Path
) -> None:
    client, root = boto3.client("s3"), s3.create_bucket("emptied")
    bucket = root.removeprefix("s3://")
    put(bucket, {f"in/{number}.jpg": picture(number) for number in range(8)})
    output = f"{root}/out"
    options = ("--input", f"{root}/in", "--output", output, "--model", model, "--gpu-actors=1")
    assert head.label_bucket(*options).returncode == 0
    for number in range(8):
        client.delete_object(Bucket=bucket, Key=f"in/{number}.jpg")
    before = published.keys(output)
    refused = head.label_bucket(*options)
    assert refused.returncode == 3, refused.stderr
    assert "an earlier night labeled some" in refused.stderr
    assert "--allow-empty" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert published.keys(output) == before
    done = head.label_bucket(*options, "--allow-empty")
    assert done.returncode == 0, done.stderr
    assert published.entries(output)[1]["counts"]["deleted"] == 8
    assert published.table(output, "deletions").num_rows == 8
    # Back again: everything is new.
    put(bucket, {"in/0.jpg": picture(0)})
    assert head.label_bucket(*options).returncode == 0
    assert published.entries(output)[2]["counts"]["labeled"] == 1


@pytest.mark.slow
def test_a_source_that_is_empty_where_the_workers_are_deletes_nothing_and_the_next_night_sees_all(
    driver: None, model: str, tmp_path: Path
) -> None:
    images, output = tmp_path / "images", str(tmp_path / "out")
    images.mkdir()
    for number in range(8):
        (images / f"{number}.jpg").write_bytes(picture(number))
    config = load_config(["--input", str(images), "--output", output, "--model", model, "--gpu-actors=1"], {})
    label_bucket(config, start_engine=lambda: None)

    def unmount() -> None:
        images.rename(tmp_path / "elsewhere")
        images.mkdir()

    with pytest.raises(SourceError, match="expected objects, found none, and an earlier night labeled some"):
        label_bucket(config, start_engine=unmount)
    images.rmdir()
    (tmp_path / "elsewhere").rename(images)
    label_bucket(config, start_engine=lambda: None)
    first, given_up, second = published.entries(output)
    assert (first["kind"], given_up["kind"], second["kind"]) == ("run", "abandoned", "run")
    assert (second["counts"]["unchanged"], second["counts"]["deleted"]) == (8, 0)


@pytest.mark.slow
def test_a_night_that_died_long_ago_is_finished_and_then_tonight_is_planned(
    head: Head, s3: S3Server, model: str
) -> None:
    source = Place(f"{s3.create_bucket('long-ago')}/in", s3.client)
    put(source.bucket, {f"in/{number}.jpg": picture(number) for number in (1, 2)})
    undisturbed = label_undisturbed(head, source, Path(model))
    s3.client.delete_object(Bucket=source.bucket, Key="in/2.jpg")
    output = Place(f"s3://{source.bucket}/out", s3.client)
    options = ("--input", source.url, "--output", output.url, "--model", model, "--gpu-actors=1")
    kills = Kills(s3, source, output, undisturbed)
    with watched(kills, source, undisturbed, Path(model), head, MAX_S):
        kills.crashed(head.label_bucket(*options, crash_at="plan-sealed"))
        values = json.loads(output.read("_log/00000001.claim.json"))
        yesterday = datetime.fromisoformat(values["created_at"]) - timedelta(hours=20)
        # What is left of the report of a driver that died while it wrote it.
        left = {
            "_log/00000001.claim.json": json.dumps({**values, "created_at": yesterday.isoformat()}).encode(),
            f"_runs/{values['run_id']}/report.json": b'{"run_id": "000',
        }
        put(source.bucket, {"in/2.jpg": picture(2), **{output.prefix + key: data for key, data in left.items()}})
        done = head.label_bucket(*options)
    assert done.returncode == 0, done.stderr
    assert "planning anew" in done.stderr
    counts = [(entry["counts"]["labeled"], entry["counts"]["unchanged"]) for entry in published.entries(output.url)]
    assert counts == [(1, 0), (1, 1)]


@pytest.mark.slow
def test_a_report_that_cannot_be_read_keeps_nobody_from_the_next_night(head: Head, model: str, tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    (images / "1.jpg").write_bytes(picture(1))
    options = ("--input", str(images), "--output", str(output), "--model", model, "--gpu-actors=1")
    assert head.label_bucket(*options).returncode == 0
    (report,) = output.glob("_runs/*/report.json")
    report.write_bytes(b'{"run_id": "000')
    done = head.label_bucket(*options)
    assert done.returncode == 0, done.stderr
    first, second = published.reports(str(output))
    assert (first["exit_code"], second["exit_code"]) == (0, 0)


@pytest.mark.slow
def test_a_catalog_file_that_is_gone_or_damaged_ends_the_night_and_restoring_it_finishes_it(
    head: Head, model: str, tmp_path: Path
) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(4):
        (images / f"{number}.jpg").write_bytes(picture(number))
    options = ("--input", str(images), "--output", str(output), "--model", model, "--gpu-actors=1")
    assert head.label_bucket(*options).returncode == 0
    (images / "new.jpg").write_bytes(picture(9))
    (path,) = (output / "_catalog").rglob("*.parquet")
    data = path.read_bytes()
    for damaged in (None, data[:-9]):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        refused = head.label_bucket(*options)
        assert refused.returncode == 5, refused.stderr
        assert f"{path.name}: expected the file of the log" in refused.stderr
        assert "restore it" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert len(published.entries(str(output))) == 1
    path.write_bytes(data)
    done = head.label_bucket(*options)
    assert done.returncode == 0, done.stderr
    assert published.entries(str(output))[1]["counts"]["unchanged"] == 4


@pytest.mark.slow
def test_a_label_file_that_is_gone_stops_the_next_night_before_it_writes(
    head: Head, model: str, tmp_path: Path
) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    (images / "1.jpg").write_bytes(picture(1))
    options = ("--input", str(images), "--output", str(output), "--model", model, "--gpu-actors=1")
    assert head.label_bucket(*options).returncode == 0
    (path,) = (output / "labels").rglob("*.parquet")
    path.unlink()
    before = published.keys(str(output))
    refused = head.label_bucket(*options)
    assert refused.returncode == 5, refused.stderr
    assert f"{path.name}: expected the" in refused.stderr
    assert published.keys(str(output)) == before


# --- at once ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(s3: S3Server) -> Place:
    """Of 200 some are broken."""
    return fill_with_pictures(s3, "two-drivers", 200, seed=14)


@pytest.fixture(scope="module")
def undisturbed(head: Head, pictures: Place, model: str) -> Place:
    """The output of one driver."""
    return label_undisturbed(head, pictures, Path(model))


@pytest.fixture
def kills(s3: S3Server, pictures: Place, undisturbed: Place, request: pytest.FixtureRequest) -> Kills:
    return Kills(s3, pictures, Place(f"s3://{pictures.bucket}/{request.node.name}", s3.client), undisturbed)


@pytest.mark.slow
def test_a_second_driver_of_a_run_waits_for_the_first_and_says_what_it_published(
    head: Head, model: str, pictures: Place, undisturbed: Place, kills: Kills
) -> None:
    output = kills.output.url
    options = ("--input", pictures.url, "--output", output, "--model", model, "--gpu-actors=1")
    kills.num_read_twice = 1  # the second driver's first look
    with (
        watched(kills, pictures, undisturbed, Path(model), head, MAX_S),
        head.start_label_bucket(*options) as first,
    ):
        wait_until(lambda: any(key.endswith("/heartbeat.json") for key in published.keys(output)))
        first.send_signal(signal.SIGSTOP)
        with head.start_label_bucket(*options) as second:
            assert second.stderr is not None
            assert any(f"waiting for its other driver (process {first.pid} on " in line for line in second.stderr)
            first.send_signal(signal.SIGCONT)
            _, printed = first.communicate(timeout=120)
            _, said = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), printed + said
    assert "exit code 0: published run 00000001-" in said
    assert "to label in" not in said
    assert len(published.entries(output)) == 1


@pytest.mark.slow
def test_a_driver_that_went_silent_and_comes_back_ends_in_the_result_of_the_one_that_took_over(
    head: Head, model: str, pictures: Place, undisturbed: Place, kills: Kills
) -> None:
    output = kills.output.url
    options = ("--input", pictures.url, "--output", output, "--model", model, "--gpu-actors=1")
    kills.num_read_twice = 200 + 1  # both may do all of it; and the second driver's first look
    with (
        watched(kills, pictures, undisturbed, Path(model), head, MAX_S),
        head.start_label_bucket(*options) as first,
    ):
        wait_until(lambda: any(key.endswith("/plan.json") for key in published.keys(output)))
        first.send_signal(signal.SIGSTOP)
        second = head.label_bucket(*options)
        assert second.returncode == 0, second.stderr
        assert "or to be silent for 30 s" in second.stderr
        before = published.keys(output)
        first.send_signal(signal.SIGCONT)
        _, printed = first.communicate(timeout=120)
    assert first.returncode == 0, printed
    after = published.keys(output)
    kept = [key for key in before if not key.endswith(("/report.json", "/report.html", "/heartbeat.json"))]
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    (entry,) = published.entries(output)
    assert entry["counts"] == published.entries(undisturbed.url)[0]["counts"]
    assert entry["counts"]["failed"] > 0


def test_of_two_different_commands_at_once_one_runs_and_the_other_names_it(
    head: Head, model: str, pictures: Place, undisturbed: Place, kills: Kills, s3: S3Server
) -> None:
    output = kills.output.url
    options = ("--input", pictures.url, "--output", output, "--model", model, "--gpu-actors=1")
    kills.num_read_twice = 1  # the other one's first look
    chosen = Place(pictures.url, s3.client)
    with watched(kills, chosen, undisturbed, Path(model), head, MAX_S):
        with (
            head.start_label_bucket(*options, "--limit=40") as first,
            head.start_label_bucket(*options, "--limit=50") as second,
        ):
            printed = [driver.communicate(timeout=200)[1] for driver in (first, second)]
        codes = {first.returncode: printed[0], second.returncode: printed[1]}
        assert sorted(codes) == [0, 5], printed
        chosen.first = 40 if first.returncode == 0 else 50
    (entry,) = published.entries(output)
    assert f"has an open run {entry['run_id']} of " in codes[5]
    assert "--abandon-run" in codes[5]
    assert entry["counts"]["listed"] == entry["identity"]["limit"] == chosen.first


# --- what it says of itself ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_night_of_other_pictures_is_warned_of_and_an_ordinary_one_is_not(head: Head, tmp_path: Path) -> None:
    images, output = tmp_path / "images", str(tmp_path / "out")
    command = [sys.executable, "jobs/draw_images.py", "--output", str(images), "--num-images=240"]
    options = ("--input", str(images), "--output", output, "--model", "demo", "--gpu-actors=1")
    for seed in (1, 2):
        subprocess.run([*command, f"--seed={seed}"], cwd=ROOT, env=head.environment, check=True, capture_output=True)
        ordinary = head.label_bucket(*options)
        assert ordinary.returncode == 0, ordinary.stderr
        assert "drift" not in ordinary.stderr
    for index in range(240):
        file = draw_file(3, index)
        image = Image.open(io.BytesIO(file.data)).convert("RGB").rotate(90)
        (images / f"turned-{index}.png").parent.mkdir(exist_ok=True)
        image.save(images / f"turned-{index}.png")
    turned = head.label_bucket(*options)
    assert turned.returncode == 0, turned.stderr
    assert turned.stderr.count("WARNING drift: ") >= 2
    first, second, third = published.reports(output)
    assert first["drift"] is None
    assert first["profile"]["num_images"] == second["profile"]["num_images"] == 240
    assert third["drift"] is not None


@pytest.mark.slow
def test_a_space_whose_vectors_moved_is_refused_before_anything_is_labeled(
    head: Head, model: str, tmp_path: Path
) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    (images / "1.jpg").write_bytes(picture(1))
    options = ("--input", str(images), "--output", str(output), "--model", model, "--gpu-actors=1")
    assert head.label_bucket(*options).returncode == 0
    entry_path = output / "_log" / "00000001.json"
    entry = json.loads(entry_path.read_text())
    _shift_canaries(output, entry)
    entry_path.write_text(json.dumps(entry))
    (images / "2.jpg").write_bytes(picture(2))
    refused = head.label_bucket(*options)
    assert refused.returncode == 5, refused.stderr
    assert "0.999" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not any("00000002" in key for key in published.parts(str(output)))


def _shift_canaries(output: Path, entry: dict[str, dict[str, object]]) -> None:
    """What a run with other libraries would have left: the vectors, each mirrored in one dimension."""
    from pipeline import canary, storage
    from pipeline.log import FileRef

    store = storage.connect(str(output))
    space = str(entry["identity"]["space_id"])
    vectors = canary.read(store, FileRef(**entry["canaries"]), space)  # type: ignore[arg-type]
    place = int(np.abs(vectors).mean(axis=0).argmax())
    vectors[:, place] *= -1
    (output / str(entry["canaries"]["key"])).unlink()
    ref = canary.write(store, str(entry["run_id"]), space, vectors)
    entry["canaries"] = {**entry["canaries"], "sha256": ref.sha256, "size_bytes": ref.size_bytes}


# --- many ranges --------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(head: Head) -> Iterator[None]:
    """This process as a driver of the head."""
    ray.init(address=head.address, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_bucket_of_many_ranges_is_planned_labeled_and_renewed_range_by_range(
    driver: None, s3: S3Server, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PAGE_OBJECTS", 10)
    monkeypatch.setattr(listing, "SMALL_SOURCE_PAGES", 2)
    monkeypatch.setattr(listing, "MIN_RANGE_OBJECTS", 20)
    monkeypatch.setattr(catalog, "MAX_FILE_ROWS", 40)
    root = s3.create_bucket("ranges")
    bucket = root.removeprefix("s3://")
    keys = [f"in/{'abcé'[number % 4]}/{number:03d}.jpg" for number in range(160)]
    put(bucket, {key: picture(number) if number % 40 else GARBAGE for number, key in enumerate(keys)})
    output = f"{root}/out"

    def night(*extra: str) -> dict[str, int]:
        options = ["--input", f"{root}/in", "--output", output, "--model", model, "--gpu-actors=1", *extra]
        label_bucket(load_config(options, {}), start_engine=lambda: None)
        counts: dict[str, int] = published.entries(output)[-1]["counts"]
        return counts

    def catalog_files() -> list[str]:
        entry = published.entries(output)[-1]
        return [file["key"] for file in json.loads(published.read(output, entry["catalog"]["key"]))["files"]]

    first = night()
    assert (first["listed"], first["labeled"], first["failed"]) == (160, 156, 4)
    ranges = {key.split("/parts/")[1].split("/")[0] for key in published.parts(output)}
    assert len(ranges) >= 4
    before = catalog_files()
    assert len(before) == len(ranges)
    # One new object, one that is gone, in two of the ranges.
    put(bucket, {"in/é/new.jpg": picture(999)})
    boto3.client("s3").delete_object(Bucket=bucket, Key=keys[0])
    second = night()
    assert (second["labeled"], second["deleted"], second["unchanged"]) == (1, 1, 159)
    after = catalog_files()
    assert len(set(after) - set(before)) == 2  # small neighbours in the ranges that changed become one
    assert set(after) & set(before)
    # A limit looks at the first ranges only, and the catalog of the others stays.
    put(bucket, {keys[4]: picture(1001), keys[3]: picture(1002)})
    third = night("--limit=30")
    assert (third["labeled"], third["unchanged"], third["listed"]) == (1, 29, 30)
    assert len(set(catalog_files()) - set(after)) == 1
    fourth = night()
    assert (fourth["labeled"], fourth["unchanged"], fourth["deleted"]) == (1, 159, 0)
    rows = [row["uri"] for row in published.table(output, "labels").to_pylist()]
    assert set(rows) >= {f"{root}/{key}" for number, key in enumerate(keys) if number % 40}
