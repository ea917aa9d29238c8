"""What a night finds: every object in exactly one place, whatever the listing does and however it is cut."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import S3Server
from test_plan import Place, row

from pipeline import catalog, diff, listing, plan, storage, store
from pipeline.catalog import CatalogRow, KeyRange
from pipeline.diff import COUNTS, Deletion, Rules
from pipeline.errors import TRANSIENT, FailureKind, UnstableError
from pipeline.listing import Scope
from pipeline.plan import UnitSizes
from pipeline.storage import ObjectInfo

# Keys that sort differently in UTF-16, around the slash, and as folders.
some_keys = st.lists(st.text("a/-0é\ue000😀", min_size=1, max_size=4), unique=True, max_size=25).map(
    lambda keys: sorted(keys, key=str.encode)
)
outcomes = st.sampled_from([None, *map(str, FailureKind)])


class Listing:
    """A source that lists what it is told, page by page, and can be told to lose or repeat pages."""

    can_seek = True

    def __init__(self, infos: list[ObjectInfo], page_objects: int = 3) -> None:
        self.root = self.url = "s3://photos"
        self.infos, self.page_objects = infos, page_objects
        self.lost: set[str] = set()
        self.losing_calls: set[int] = set()
        self.num_calls = 0
        self.num_requests = 0

    def list_pages(self, prefix: str = "", start_after: str = "") -> Iterator[list[ObjectInfo]]:
        losing = self.num_calls in self.losing_calls
        self.num_calls += 1
        found = [info for info in self.infos if info.key.startswith(prefix) and info.key > start_after]
        for start in range(0, len(found), self.page_objects):
            self.num_requests += 1
            page = [info for info in found[start : start + self.page_objects] if not (losing and info.key in self.lost)]
            if page:
                yield page

    def get(self, key: str, **_: Any) -> bytes:
        raise AssertionError("planning reads no object")


def info(key: str, etag: str = "e1") -> ObjectInfo:
    return ObjectInfo(key, 10, etag, row("k")["last_modified"])


def rules(**options: Any) -> Rules:
    return Rules(**{"scope": Scope(), "limit": None, "records_deletions": True, **options})


def compare(
    source: Listing, place: Place, ranges: list[KeyRange], **options: Any
) -> tuple[list[str], list[str], dict[str, int]]:
    """Keys to label, keys that are gone, and the counts, over all ranges."""
    planned, gone = list[str](), list[str]()
    total = dict.fromkeys(COUNTS, 0)
    for each in ranges:
        counts: dict[str, int] = {}
        for found in diff.compare(source, place.output, each, rules(**options), counts):
            if isinstance(found, Deletion):
                gone.append(found.row["key"])
            else:
                planned.append(found.key)
        for name in COUNTS:
            total[name] += counts[name]
    return planned, gone, total


@given(
    some_keys, some_keys, st.data(), st.integers(1, 5), st.integers(1, 7), st.sampled_from(["changed", "failed", "all"])
)
@settings(deadline=None, max_examples=80, derandomize=True)
def test_planned_unchanged_and_deleted_are_exactly_right_for_any_two_nights_and_any_cut(
    listed: list[str], known: list[str], data: st.DataObject, page_objects: int, rows_per_file: int, relabel: str
) -> None:
    kind_of = {key: data.draw(outcomes) for key in known}
    etag_of = {key: data.draw(st.sampled_from(["e1", "e2"])) for key in listed}
    known_rows: list[CatalogRow] = [row(key, failure_kind=kind_of[key]) for key in known]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MAX_FILE_ROWS", rows_per_file)
        place = Place(Path(folder))
        place.remember(known_rows, rows_per_file=rows_per_file)
        source = Listing([info(key, etag_of[key]) for key in listed], page_objects)
        ranges = catalog.ranges(place.catalog, is_divisible=True)
        planned, gone, counts = compare(source, place, ranges, relabel=relabel)

    def holds(key: str) -> bool:
        kind = kind_of[key]
        if relabel == "all" or (relabel == "failed" and kind is not None):
            return False
        return etag_of[key] == "e1" and kind not in TRANSIENT and kind != FailureKind.ARCHIVED

    unchanged = [key for key in listed if key in kind_of and holds(key)]
    assert planned == [key for key in listed if key not in unchanged]
    assert gone == [key for key in known if key not in etag_of]
    assert counts == {
        "listed": len(listed),
        "filtered": 0,
        "unchanged": len(unchanged),
        "planned": len(planned),
        "known": len(set(listed) & set(known)),
        "kept": 0,
        "deleted": len(gone),
    }


@given(some_keys, st.data())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_unit_ids_do_not_depend_on_page_size_or_on_pages_that_were_lost_and_found(
    listed: list[str], data: st.DataObject
) -> None:
    known = [key for key in listed if data.draw(st.booleans())]
    found = set()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        place = Place(Path(folder))
        place.remember([row(key) for key in known], rows_per_file=100)
        for number, (page_objects, losing_calls) in enumerate([(1, ()), (4, ()), (2, (0,)), (1000, (0, 2))]):
            patch.setattr(store, "PAGE_OBJECTS", page_objects)
            source = Listing([info(key) for key in listed], page_objects)
            source.lost, source.losing_calls = {*known[:2]}, {*losing_calls}
            planned = plan.plan_range(
                source, place.output, f"{number:08d}-0", place.whole, rules(), UnitSizes(3, has_ramp=True)
            )
            found.add(tuple(unit_id for chunk in planned.chunks for unit_id in chunk.unit_ids))
            assert planned.counts["deleted"] == 0
    assert len(found) == 1


# --- listings that cannot be trusted ------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_listing_that_loses_a_page_deletes_nothing(place: Place) -> None:
    keys = [f"{number:04d}" for number in range(3000)]
    place.remember([row(key) for key in keys], rows_per_file=5000)
    source = Listing([info(key) for key in keys], page_objects=1000)
    source.lost, source.losing_calls = {*keys[1000:2000]}, {0}
    with pytest.raises(UnstableError, match="'1000' was not in the listing and is there on a second look"):
        compare(source, place, [place.whole])


def test_a_page_that_stays_lost_is_taken_for_deletions_only_if_a_second_look_agrees(place: Place) -> None:
    keys = [f"{number:04d}" for number in range(3000)]
    place.remember([row(key) for key in keys], rows_per_file=5000)
    source = Listing([info(key) for key in keys if not "1000" <= key < "2000"], page_objects=1000)
    planned, gone, counts = compare(source, place, [place.whole])
    assert (planned, gone, counts["unchanged"]) == ([], keys[1000:2000], 2000)


def test_a_second_look_costs_at_most_as_many_requests_as_the_first(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PAGE_OBJECTS", 10)
    keys = [f"{number:04d}" for number in range(1000)]
    place.remember([row(key) for key in keys], rows_per_file=5000)
    undisturbed = Listing([info(key) for key in keys], page_objects=10)
    compare(undisturbed, place, [place.whole])
    source = Listing([info(key) for key in keys if not key.endswith("5")], page_objects=10)
    _, gone, _ = compare(source, place, [place.whole])
    assert len(gone) == 100
    assert undisturbed.num_requests == 100
    assert source.num_requests <= 2 * undisturbed.num_requests


def test_a_range_is_listed_again_when_its_listing_contradicts_itself(place: Place) -> None:
    keys = [f"{number:02d}" for number in range(50)]
    place.remember([row(key) for key in keys], rows_per_file=100)
    source = Listing([info(key) for key in keys])
    source.lost, source.losing_calls = {"10", "11"}, {0, 2}  # each time, the second look is honest
    planned = plan.plan_range(source, place.output, "run", place.whole, rules(), UnitSizes(9, has_ramp=True))
    assert (planned.counts["unchanged"], planned.counts["deleted"]) == (50, 0)
    assert source.num_calls == 5
    source.losing_calls = {5, 7, 9}
    with pytest.raises(UnstableError, match="second look"):
        plan.plan_range(source, place.output, "run 2", place.whole, rules(), UnitSizes(9, has_ramp=True))
    assert not any("run 2" in name for name in storage.list_keys(place.output, ""))


def test_an_object_that_became_a_folder_marker_is_a_changed_object_and_other_markers_are_filtered(place: Place) -> None:
    place.remember([row("a/"), row("b/1")])
    source = Listing([info("a/")._replace(size_bytes=0, etag="e0"), info("b/")._replace(size_bytes=0), info("b/1")])
    planned, gone, counts = compare(source, place, [place.whole])
    assert (planned, gone) == (["a/"], [])
    assert (counts["filtered"], counts["unchanged"]) == (1, 1)


# --- keys and cuts on a real server -------------------------------------------------------------------------------

ODD_KEYS = [
    " leading", "a b/c d", "a#b", "a%20b", "a%2Fb", "a+b", "a//b", "a/", "a/b", "a?b=c&d", "a\u0301", "á", "é" * 100,
    "\ue000", "\U0001f600", "z/\uffee", "z/\U0001f600", "x" * 1000, "~",
]  # fmt: skip


def test_odd_keys_are_listed_compared_and_cut_in_byte_order_on_s3(
    s3: S3Server, bucket: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "MAX_FILE_ROWS", 3)
    for key in ODD_KEYS:
        s3.client.put_object(Bucket=bucket[5:], Key=f"in/{key}", Body=b"x")
    source = storage.connect(f"{bucket}/in")
    in_order = sorted(ODD_KEYS, key=str.encode)
    (first,) = catalog.between([])
    planned = plan.plan_range(source, place.output, "first", first, rules(), UnitSizes(4, has_ramp=False))
    assert place.planned_keys(planned) == in_order
    etag = next(info.etag for page in source.list_pages() for info in page)
    place.remember([{**row(key), "etag": etag, "size_bytes": 1} for key in in_order], rows_per_file=3)
    ranges = catalog.ranges(place.catalog, is_divisible=source.can_seek)
    assert len(ranges) == 7
    deleted, changed = ODD_KEYS[3], ODD_KEYS[14]
    s3.client.delete_object(Bucket=bucket[5:], Key=f"in/{deleted}")
    s3.client.put_object(Bucket=bucket[5:], Key=f"in/{changed}", Body=b"other")
    found = [
        plan.plan_range(source, place.output, "second", each, rules(), UnitSizes(4, has_ramp=False)) for each in ranges
    ]
    assert [key for each in found for key in place.planned_keys(each)] == [changed]
    assert [key for each in found for key in place.deleted_keys(each)] == [deleted]
    assert sum(each.counts["unchanged"] for each in found) == len(ODD_KEYS) - 2


@given(st.lists(st.text("ab/é😀", min_size=1, max_size=6), unique=True, max_size=60), st.integers(2, 6))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_a_big_source_is_cut_into_ranges_that_cover_it_once(keys: list[str], page_objects: int) -> None:
    keys.sort(key=str.encode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "PAGE_OBJECTS", page_objects)
        patch.setattr(listing, "SMALL_SOURCE_PAGES", 2)
        patch.setattr(listing, "MIN_RANGE_OBJECTS", 8)
        source = Listing([info(key) for key in keys], page_objects)
        borders = listing.borders(source)
        assert borders == sorted(set(borders), key=str.encode)
        ranges = catalog.between(borders)
        found = [
            [each.key for page in listing.pages(source, part.after, part.through) for each in page] for part in ranges
        ]
    assert [key for each in found for key in each] == keys
    # All groups are small in the end, so no range holds more than the bound and one group.
    assert all(len(each) < 8 + page_objects for each in found)


def test_cutting_stops_when_the_requests_are_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PAGE_OBJECTS", 10)
    monkeypatch.setattr(listing, "SMALL_SOURCE_PAGES", 2)
    monkeypatch.setattr(listing, "MAX_PROBES", 30)
    source = Listing([info(f"{number:05d}") for number in range(20_000)], 10)
    borders = listing.borders(source)
    assert 5 <= len(borders) <= 100
    assert source.num_requests <= 2 + 30 + 30 * 11  # a group that was begun is finished


def test_a_small_source_is_one_range_and_so_is_one_that_cannot_be_listed_from_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert listing.borders(Listing([info(f"{number:05d}") for number in range(50)], 10)) == []
    monkeypatch.setattr(listing, "SMALL_SOURCE_PAGES", 1)
    for name in ("a", "b"):
        (tmp_path / name).touch()
    assert listing.borders(storage.connect(str(tmp_path))) == []
