"""The benchmark of planning and publishing, with few keys: it checks its own sums, and its bucket is one."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import plan_scale
import pytest
import ray
import synthetic
from cluster import Head
from synthetic import Bucket

from pipeline import storage, store_s3
from pipeline.store import ObjectInfo

NUM_KEYS = 20_500


@pytest.fixture
def _driver(head: Head) -> Iterator[None]:
    """This process as a driver of the head, with workers that find the benchmark."""
    variables = {"PYTHONPATH": os.pathsep.join(sys.path)}
    ray.init(
        address=head.address, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": variables}
    )
    yield
    ray.shutdown()


def _all(bucket: Bucket, **options: str) -> list[ObjectInfo]:
    return [info for page in bucket.list_pages(**options) for info in page]


def test_two_nights_differ_in_exactly_what_is_changed_new_and_gone() -> None:
    first, second = ({info.key: info for info in _all(Bucket(num_keys=NUM_KEYS, night=night))} for night in (1, 2))
    assert sorted(first) == list(first)
    assert sorted(second) == list(second)
    both = first.keys() & second.keys()
    counts = Bucket(num_keys=NUM_KEYS, night=2).expected_counts()
    changed = sum(first[key].etag != second[key].etag for key in both)
    assert (len(second), len(both), len(first) - len(both)) == (counts["listed"], counts["known"], counts["deleted"])
    assert (changed + len(second) - len(both), len(both) - changed) == (counts["planned"], counts["unchanged"])
    assert counts["planned"] == pytest.approx(0.008 * NUM_KEYS, rel=0.1)
    assert len({info.etag for info in [*first.values(), *second.values()]}) == len(first) + counts["planned"]


def test_a_listing_may_start_and_end_anywhere() -> None:
    bucket = Bucket(num_keys=600_000, night=1)
    begin, end = 249_500, 251_500
    keys = [info.key for info in bucket.infos(bucket.existing(begin, end))]
    found = next(bucket.list_pages(start_after=synthetic.key_of(begin - 1)))
    assert [info.key for info in found] == keys[:1000]
    assert [info.key for info in next(bucket.list_pages(start_after=keys[5]))] == keys[6:1006]
    assert next(bucket.list_pages("photos/2015/001/"))[0].key == "photos/2015/001/img_0000250000.jpg"
    assert sum(map(len, bucket.list_pages("photos/2015/002/"))) == len(bucket.existing(500_000, 600_000))
    assert _all(bucket, prefix="photos/2016/") == []
    assert _all(bucket, start_after="q") == []


def test_its_pages_are_the_same_through_the_real_client(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(num_keys=2500, night=2)
    with synthetic.serve(bucket) as url:
        for name, value in {**plan_scale.CREDENTIALS, "AWS_ENDPOINT_URL": url}.items():
            monkeypatch.setenv(name, value)
        store_s3._build_s3.cache_clear()
        found = list(store_s3.S3Store(bucket.root).list_pages())
    store_s3._build_s3.cache_clear()
    assert found == list(bucket.list_pages())
    assert bucket.num_requests == len(found) == 3


@pytest.mark.usefixtures("_driver")
def test_a_night_of_many_small_ranges_adds_up(tmp_path: Path) -> None:
    bucket = Bucket(num_keys=NUM_KEYS, night=2)
    figures = plan_scale.night(storage.connect(str(tmp_path)), bucket, rows_per_file=3000, num_workers=1)
    assert figures.num_ranges == 7
    assert figures.counts == bucket.expected_counts()
    assert figures.num_requests <= 2 * (NUM_KEYS // 1000 + 7 + 7)
    lines = list(plan_scale.report(figures, num_workers=1, rows_per_file=3000))
    assert lines[0].startswith("20,458 keys listed against 20,418 rows in 7 range(s) by 1 worker(s): 164 to label")
