"""What the operator sees while images are labeled."""

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.charts import MAX_PACES, paces
from pipeline.dataset import Resources, UnitSummary
from pipeline.meter import LOG_INTERVAL_S
from pipeline.progress import MAX_POINTS, Bottleneck, Progress, Report


def unit(**changes: Any) -> UnitSummary:
    values: dict[str, Any] = {
        "range_id": "00000",
        "unit_id": "u",
        "num_rows": 100,
        "failures": {"truncated": 2},
        "fetched_bytes": 10_000_000,
        "part_bytes": 200_000,
        "retries": {"throttled": 3},
        "prepare_s": 1.0,
        "decode_s": 0.8,
        "label_s": 0.5,
        "label_wait_s": 0.5,
        "label_queue_s": 0.25,
        "commit_queue_s": 0.0,
        "commit_s": 0.1,
    }
    return UnitSummary(**{**values, **changes})


class Clock:
    """A clock that a test sets."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


SLOTS = {"max_prepares": 2, "max_commits": 2, "num_actors": 1}


def bottleneck(**changes: float) -> Bottleneck:
    seconds = {"prepare_s": 20.0, "decode_s": 18.0, "label_s": 1.0, "label_wait_s": 9.0, **changes}
    return Bottleneck.of(seconds, 50_000_000, elapsed_s=10, **SLOTS)


def test_a_model_that_waits_for_busy_decoders_is_limited_by_decoding() -> None:
    found = bottleneck()
    assert (found.stage, found.model_wait_share, found.prepare_busy_share) == ("decoding", 0.9, 1.0)
    assert found.storage_wait_share == pytest.approx(0.1)
    assert found.storage_bytes_per_s == 5_000_000
    assert "CPU cores" in found.advice


def test_prepare_tasks_that_wait_for_bytes_are_limited_by_storage() -> None:
    assert bottleneck(decode_s=4.0).stage == "storage"


def test_a_model_that_hardly_waits_is_the_limit_itself() -> None:
    found = bottleneck(label_s=9.0, label_wait_s=1.0, prepare_s=5.0, decode_s=1.0)
    assert found.stage == "model"
    assert "more GPUs" in found.advice


def test_where_neither_is_busy_workers_are_still_starting() -> None:
    assert bottleneck(prepare_s=1.0, decode_s=1.0).stage == "starting"
    # The actors came late, and had no time to wait for anything.
    assert bottleneck(label_s=2.0, label_wait_s=0.1, prepare_s=5.0).stage == "starting"
    assert Bottleneck.of({}, 0, elapsed_s=1e-9, max_prepares=1, max_commits=1, num_actors=1).stage == "starting"


def test_parts_that_wait_for_their_store_are_limited_by_writing() -> None:
    found = bottleneck(prepare_s=5.0, decode_s=4.0, commit_s=15.0)
    assert (found.stage, found.commit_busy_share) == ("writing", 0.75)
    assert "the output's region" in found.advice


def test_a_log_gets_a_line_per_interval_and_one_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    progress = Progress(1000, **SLOTS, stream=io.StringIO(), clock_s=clock)
    progress.skip(600)
    for seconds in (1.0, LOG_INTERVAL_S + 1, LOG_INTERVAL_S + 2, LOG_INTERVAL_S + 3):
        clock.now_s = seconds
        progress.add(unit())
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    rate = 400 / clock.now_s
    assert lines[-1] == (
        f"1,000/1,000 images, {rate:.0f} images/s, 8 failed (8 truncated), ETA 0:00:00, limit: starting (model waits"
        f" 50%, preparing waits 85%, storage 20% of preparing, {40 / clock.now_s:.1f} MB/s): larger runs are"
        " faster per image"
    )


def test_a_report_has_what_was_counted_and_one_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    progress = Progress(200, **SLOTS, stream=io.StringIO(), clock_s=Clock())
    for _ in range(2):
        progress.add(unit())
    output, report = storage.connect_output(str(tmp_path)), Report(run_id="run")
    report.add_progress(progress)
    report.write(output)
    assert Report.read(output, "run") == report
    assert (report.num_parts, report.fetched_bytes, report.part_bytes) == (2, 20_000_000, 400_000)
    assert report.retries == {"throttled": 6}
    assert report.stage_s["commit_s"] == 0.2
    assert report.stage_s["label_queue_s"] == 0.5
    values = json.loads(output.get("_runs/run/report.json"))
    for name in ("num_parts", "fetched_bytes", "part_bytes", "retries"):
        del values[name]
    output.put("_runs/run/report.json", json.dumps(values).encode())
    assert Report.read(output, "run") == replace(report, num_parts=0, fetched_bytes=0, part_bytes=0, retries={})
    for damaged in (b"{}", b"null", b"[]", b"7", b"{"):
        output.put("_runs/run/report.json", damaged)
        assert Report.read(output, "run") is None


@pytest.mark.parametrize("num_units", [1, 2, 150, MAX_POINTS - 3, MAX_POINTS, 1000, 12_345])
def test_the_series_of_points_is_bounded_even_and_complete(num_units: int) -> None:
    clock = Clock()
    progress = Progress(100 * num_units + 600, **SLOTS, stream=io.StringIO(), clock_s=clock)
    progress.skip(600)
    assert progress.points() == [(0.0, 600), (0.0, 600)]
    for number in range(num_units):
        clock.now_s = number + 1.0
        progress.add(unit())
        assert len(progress.points()) <= MAX_POINTS
    points = progress.points()
    assert points[-1] == (num_units, 100 * num_units + 600)
    assert len(points) > min(num_units, MAX_POINTS / 2 - 2)
    assert all(done == 100 * seconds + 600 for seconds, done in points)
    found = paces(points)
    assert len(found) == min(MAX_PACES, len(points) - 1)
    assert [each.images_per_s for each in found] == pytest.approx([100] * len(found))
    assert (found[0].from_s, found[-1].to_s) == (0, num_units)


def test_paces_show_where_it_stood_still() -> None:
    found = paces([(0.0, 0), (1.0, 100), (3.0, 100), (4.0, 500)])
    assert [round(each.images_per_s) for each in found] == [75, 0, 300]
    assert [each.length for each in found] == pytest.approx([0.25, 0, 1])
    assert paces([]) == paces([(0.0, 5)]) == paces([(0.0, 5), (0.0, 5)]) == []


def test_a_million_images_cost_what_the_cluster_does_while_it_makes_them() -> None:
    told = Report(started_at="2026-11-22T03:00:00+00:00", ended_at="2026-11-22T03:03:00+00:00")
    told.points = [(0.0, 1000), (60.0, 3000)]
    assert told.cost() is None
    told.config = {"price_per_hour": 6.0}
    found = told.cost()
    assert found is not None
    assert found.labeling_per_million == pytest.approx(0.1 / 2000 * 1e6)
    assert found.whole_per_million == pytest.approx(0.3 / 2000 * 1e6)
    told.points = [(0.0, 1000), (60.0, 1000)]
    assert told.cost() is None


def test_slots_for_preparing_are_those_that_the_actors_leave() -> None:
    on_cpus = Resources(device="cpu", num_actors=2, cluster_cpus=2, cluster_gpus=0)
    assert on_cpus.max_prepares == 2
    on_gpus = Resources(device="cuda", num_actors=4, cluster_cpus=64, cluster_gpus=4)
    assert on_gpus.max_prepares == 79
