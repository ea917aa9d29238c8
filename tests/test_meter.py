"""How far long work is: lines at intervals, and silence for work that is short."""

import logging

import pytest

from pipeline.meter import clock_text, metered


def test_a_line_an_interval_says_how_far_and_how_long_still(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now_s = iter(range(0, 10_000, 4))
    items = list(range(1500))
    assert list(metered(items, "planning ranges", 1500, clock_s=lambda: next(now_s))) == items
    lines = [record.message for record in caplog.records]
    assert lines[0] == "planning ranges: 3 of 1,500, ETA 1:39:48"
    assert len(lines) == 499  # one every three items, and none for the last


def test_work_that_ends_within_an_interval_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert list(metered(range(5), "publishing files", 5)) == list(range(5))
    assert caplog.records == []


def test_items_may_stand_for_several_things_and_the_total_may_be_unknown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now_s = iter(range(0, 10_000, 10))
    list(metered([[1, 2], [3], []], "labeling pictures", 9, size=len, clock_s=lambda: next(now_s)))
    list(metered([[1, 2], [3] * 998], "labeling pictures", None, size=len, clock_s=lambda: next(now_s)))
    assert [record.message for record in caplog.records] == [
        "labeling pictures: 2 of 9, ETA 0:00:35",
        "labeling pictures: 3 of 9, ETA 0:00:40",
        "labeling pictures: 3 of 9, ETA 0:01:00",
        "labeling pictures: 2 so far",
        "labeling pictures: 1,000 so far",
    ]


def test_a_duration_is_hours_minutes_and_seconds() -> None:
    assert [clock_text(seconds) for seconds in (0, 61.9, 36_000)] == ["0:00:00", "0:01:01", "10:00:00"]
