"""The plan: every listed object in exactly one place, and nothing ever planned twice."""

import dataclasses
import hashlib
import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import catalog, diff, plan, schema, storage, store
from pipeline.catalog import CatalogRow, KeyRange
from pipeline.diff import Listed, Rules
from pipeline.errors import TRANSIENT, ConflictError, FailureKind, UnstableError
from pipeline.listing import Scope
from pipeline.log import FileRef
from pipeline.plan import RangePlan, UnitSizes
from pipeline.storage import ObjectInfo, Store

WHEN = datetime(2026, 11, 22, tzinfo=UTC)
RUN = "00000001-0123abcd"
PERMANENT = sorted(set(FailureKind) - TRANSIENT)

quickly = settings(deadline=None, max_examples=60, derandomize=True)
# Keys that sort differently in UTF-16, and around the slash.
some_keys = st.lists(st.text("a/-0é\ue000😀", min_size=1, max_size=4), unique=True, max_size=25).map(
    lambda keys: sorted(keys, key=str.encode)
)


def info(key: str, etag: str | None = "e1", size_bytes: int = 10) -> ObjectInfo:
    return ObjectInfo(key, size_bytes, etag, WHEN)


def row(key: str, etag: str | None = "e1", size_bytes: int = 10, failure_kind: str | None = None) -> CatalogRow:
    return {
        "key": key,
        "etag": etag,
        "size_bytes": size_bytes,
        "last_modified": WHEN,
        "failure_kind": failure_kind,
        "run_seq": 1,
    }


def join(listed: Sequence[str], known: Sequence[str]) -> list[tuple[Listed | None, CatalogRow | None]]:
    return list(diff.merge_join((Listed(info(key), True) for key in listed), map(row, known)))


# --- the join -----------------------------------------------------------------------------------------------------


@given(some_keys, some_keys)
@quickly
def test_the_join_gives_every_key_of_either_side_once_and_in_order(listed: list[str], known: list[str]) -> None:
    joined = join(listed, known)
    found = [left.info.key if left is not None else (right or {})["key"] for left, right in joined]
    assert found == sorted({*listed, *known}, key=str.encode)
    assert [left.info.key for left, _ in joined if left is not None] == listed
    assert [right["key"] for _, right in joined if right is not None] == known
    for left, right in joined:
        assert left is None or right is None or left.info.key == right["key"]


@given(some_keys.filter(lambda keys: len(keys) > 1), some_keys, st.data())
@quickly
def test_a_listing_out_of_order_or_with_a_page_repeated_is_refused(
    listed: list[str], known: list[str], data: st.DataObject
) -> None:
    first, second = sorted(data.draw(st.lists(st.integers(0, len(listed) - 1), min_size=2, max_size=2, unique=True)))
    swapped = list(listed)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    repeated = listed[: second + 1] + listed[first:]
    doubled = listed[: first + 1] + listed[first:]
    for wrong in (swapped, repeated, doubled):
        with pytest.raises(UnstableError, match="not in order"):
            join(wrong, known)


@pytest.mark.parametrize(
    ("known", "found", "expected"),
    [
        (row("k"), info("k"), True),
        (row("k", failure_kind="corrupt"), info("k"), True),
        (row("k", failure_kind="missing"), info("k"), False),
        (row("k"), info("k", etag="e2"), False),
        (row("k"), info("k", size_bytes=11), False),
        (row("k", etag=None), info("k", etag=None), True),
        (row("k", etag=None), info("k", etag=None)._replace(last_modified=WHEN.replace(hour=1)), False),
        (row("k"), info("k")._replace(last_modified=WHEN.replace(hour=1)), True),
    ],
)
def test_an_outcome_stands_while_the_object_is_the_same(known: CatalogRow, found: ObjectInfo, expected: bool) -> None:
    assert diff.is_final(known, found) is expected


@pytest.mark.parametrize("kind", list(FailureKind))
def test_failures_that_may_pass_are_tried_again(kind: FailureKind) -> None:
    is_final = diff.is_final(row("k", failure_kind=str(kind)), info("k"))
    assert is_final is (kind not in TRANSIENT and kind is not FailureKind.ARCHIVED)


def test_an_archived_object_is_tried_again_once_it_is_restored() -> None:
    known = row("k", failure_kind="archived")
    assert diff.is_final(known, info("k")._replace(storage_class="GLACIER"))
    assert not diff.is_final(known, info("k")._replace(storage_class="STANDARD"))


# --- a whole range ------------------------------------------------------------------------------------------------


class Place:
    """An input folder, an output folder, and the catalog of an earlier night."""

    def __init__(self, folder: Path) -> None:
        self.source, self.output_folder = folder / "in", folder / "out"
        self.source.mkdir(parents=True)
        self.output: Store = storage.connect(str(self.output_folder))
        self.catalog: list[FileRef] = []

    def write(self, sizes: dict[str, int]) -> dict[str, ObjectInfo]:
        for key, size_bytes in sizes.items():
            path = self.source / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(size_bytes))
        return {each.key: each for page in storage.connect(str(self.source)).list_pages() for each in page}

    def remember(self, rows: Sequence[CatalogRow], *, rows_per_file: int = 7) -> None:
        for number, start in enumerate(range(0, len(rows), rows_per_file)):
            some = rows[start : start + rows_per_file]
            data = schema.encode(pa.Table.from_pylist(list(some), schema.CATALOG))
            key = f"_catalog/{number}.parquet"
            self.output.put(key, data)
            self.catalog.append(
                FileRef(
                    key=key,
                    num_rows=len(some),
                    size_bytes=len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                    first_key=some[0]["key"],
                    last_key=some[-1]["key"],
                )
            )

    @property
    def whole(self) -> KeyRange:
        (key_range,) = catalog.ranges(self.catalog, is_divisible=False)
        return key_range

    def rules(self, **options: Any) -> Rules:
        return Rules(**{"scope": Scope(), "limit": None, "records_deletions": True, **options})

    def plan(
        self, run_id: str = RUN, max_unit_rows: int = 1024, key_range: KeyRange | None = None, **options: Any
    ) -> RangePlan:
        sizes = UnitSizes(max_unit_rows, has_ramp=True)
        stores = storage.connect(str(self.source)), self.output
        return plan.plan_range(*stores, run_id, key_range or self.whole, self.rules(**options), sizes)

    def preview(self, max_unit_rows: int = 1024, **options: Any) -> RangePlan:
        stores = storage.connect(str(self.source)), self.output
        return plan.preview_range(*stores, self.whole, self.rules(**options), UnitSizes(max_unit_rows, has_ramp=True))

    def units(self, planned: RangePlan) -> Iterator[tuple[str, pa.Table]]:
        for chunk in planned.chunks:
            for unit_id in chunk.unit_ids:
                yield unit_id, plan.read_unit(self.output, chunk.key, unit_id)

    def planned_keys(self, planned: RangePlan) -> list[str]:
        return [key for _, table in self.units(planned) for key in table.column("key").to_pylist()]

    def deleted_keys(self, planned: RangePlan) -> list[str]:
        return [each["key"] for file in planned.deletions for each in self.read(file)]

    def keys(self) -> list[str]:
        return sorted(storage.list_keys(self.output, ""))

    def read(self, key: str) -> list[dict[str, Any]]:
        return list(pq.read_table(pa.BufferReader(self.output.get(key))).to_pylist())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


Fate = st.sampled_from(
    ["new", "same", "same failure", "may pass", "other etag", "other size", "gone", "left out", "left out and known"]
)
fates = st.dictionaries(st.from_regex(r"[a-cé](/[a-c]|-[a-c]|)[0-9]", fullmatch=True), Fate, max_size=24)


@given(fates, st.booleans(), st.sampled_from([1, 3, 1024]), st.sampled_from([2, 1000]))
@settings(deadline=None, max_examples=25, derandomize=True)
def test_every_object_is_planned_unchanged_deleted_or_filtered(
    fate_of: dict[str, str], records_deletions: bool, max_unit_rows: int, rows_per_file: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        listed = place.write({key: 1 + len(key) for key, fate in fate_of.items() if fate != "gone"})
        known: list[CatalogRow] = []
        for key in sorted({*fate_of}, key=str.encode):
            fate, found = fate_of[key], listed.get(key)
            if fate not in ("new", "left out"):
                etag, size_bytes = (found.etag, found.size_bytes) if found else ("e", 1)
                known.append(
                    row(
                        key,
                        "another" if fate == "other etag" else etag,
                        size_bytes + (fate == "other size"),
                        {"same failure": "corrupt", "may pass": "unavailable"}.get(fate),
                    )
                )
        place.remember(known, rows_per_file=rows_per_file)
        left_out = {key for key, fate in fate_of.items() if fate.startswith("left out")}
        scope = Scope(exclude=tuple(sorted(left_out)))
        unmeant = {key for key in fate_of if any(key == name or key.endswith(f"/{name}") for name in left_out)}
        excluded = unmeant & listed.keys()
        options: dict[str, Any] = {"scope": scope, "records_deletions": records_deletions}
        planned = place.plan(max_unit_rows=max_unit_rows, **options)

        def keys_of(*names: str) -> list[str]:
            return sorted(
                (key for key, fate in fate_of.items() if fate in names and key not in unmeant), key=str.encode
            )

        to_do = keys_of("new", "may pass", "other etag", "other size")
        known_keys = {each["key"] for each in known}
        deleted = keys_of("gone") if records_deletions else []
        assert place.planned_keys(planned) == to_do
        assert place.deleted_keys(planned) == deleted
        assert planned.counts == {
            "listed": len(listed),
            "filtered": len(excluded),
            "unchanged": len(keys_of("same", "same failure")),
            "planned": len(to_do),
            "known": len(known_keys & (listed.keys() - excluded)),
            "kept": len(known_keys - (listed.keys() - excluded)) - len(deleted),
            "deleted": len(deleted),
        }
        preview = place.preview(max_unit_rows=max_unit_rows, **options)
        assert preview.counts == planned.counts
        assert [(chunk.unit_ids, chunk.encoded_bytes) for chunk in preview.chunks] == [
            (chunk.unit_ids, chunk.encoded_bytes) for chunk in planned.chunks
        ]
        for unit_id, table in place.units(planned):
            assert plan.unit_id(table) == unit_id
            assert len(table) <= max_unit_rows
        assert sum(sum(chunk.unit_rows) for chunk in planned.chunks) == len(to_do)
        assert sum(chunk.encoded_bytes for chunk in planned.chunks) == sum(listed[key].size_bytes for key in to_do)


def _sizes(place: Place, planned: RangePlan) -> list[int]:
    return [len(table) for _, table in place.units(planned)]


def test_units_grow_along_the_ramp(place: Place) -> None:
    with ThreadPoolExecutor(2) as pool:
        place.source.mkdir(exist_ok=True)
        list(pool.map(lambda number: (place.source / f"{number:05d}").touch(), range(16 * 64 + 3 * 256 + 10)))
    planned = place.plan()
    assert _sizes(place, planned) == [64] * 16 + [256] * 3 + [10]
    assert [len(chunk.unit_ids) for chunk in planned.chunks] == [16, 4]


def test_the_ramp_ends_at_the_largest_unit_and_never_exceeds_it() -> None:
    assert list(itertools.islice(plan._row_limits(1024, has_ramp=True), 34)) == [64] * 16 + [256] * 16 + [1024] * 2
    assert set(itertools.islice(plan._row_limits(100, has_ramp=True), 40)) == {64, 100}
    assert set(itertools.islice(plan._row_limits(3, has_ramp=True), 40)) == {3}


def test_a_plan_of_several_ranges_has_large_units_from_the_start() -> None:
    assert UnitSizes.of(224, 1) == (1024, True)
    assert UnitSizes.of(224, 2) == (1024, False)
    assert set(itertools.islice(plan._row_limits(1024, has_ramp=False), 40)) == {1024}


@pytest.mark.parametrize(("input_px", "expected"), [(64, 1024), (224, 1024), (384, 361), (8000, 1)])
def test_the_largest_unit_is_bounded_by_its_model_input(input_px: int, expected: int) -> None:
    assert UnitSizes.of(input_px, 1).max_unit_rows == expected
    assert expected == 1 or expected * input_px * input_px * 3 <= plan.MAX_UNIT_INPUT_BYTES


def test_a_unit_is_bounded_by_its_encoded_bytes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_UNIT_ENCODED_BYTES", 100)
    place.write({"a": 60, "b": 40, "c": 1, "d": 500, "e": 60, "f": 60})
    assert _sizes(place, place.plan()) == [2, 1, 1, 1, 1]


def test_units_do_not_depend_on_how_the_listing_was_paged(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write({f"{number // 7}/{number:03d}": number for number in range(150)})
    ids = set()
    for page_objects in (1, 7, 64, 1000):
        monkeypatch.setattr(store, "PAGE_OBJECTS", page_objects)
        planned = place.plan(f"{page_objects:08d}-00000000")
        ids.add(tuple(unit_id for unit_id, _ in place.units(planned)))
    assert len(ids) == 1


def test_a_unit_id_changes_with_everything_that_makes_its_objects_and_with_nothing_else() -> None:
    def unit_id(*infos: ObjectInfo, root: str = "s3://a") -> str:
        return plan.unit_id(plan.objects_table(root, infos))

    first, second = info("a"), info("b")
    base = unit_id(first, second)
    others = [
        unit_id(first),
        unit_id(second, first),
        unit_id(first, info("c")),
        unit_id(first, info("b", etag="e2")),
        unit_id(first, info("b", etag=None)),
        unit_id(first, info("b", size_bytes=11)),
    ]
    assert len({base, *others}) == 1 + len(others)
    assert unit_id(first, second, root="s3://b") == base
    assert unit_id(first, second._replace(last_modified=None, storage_class="X", version_id="v", extra="{}")) == base


def test_a_unit_is_read_back_as_it_was_listed(place: Place) -> None:
    listed = place.write({f"é {number}.jpg": number for number in range(200)})
    planned = place.plan(max_unit_rows=9)
    tables = [table for _, table in place.units(planned)]
    assert all(table.schema.equals(schema.OBJECTS) for table in tables)
    rows = pa.concat_tables(tables).to_pylist()
    assert [each["key"] for each in rows] == list(listed)
    root = storage.normalize(str(place.source))
    for each in rows:
        found = listed[each["key"]]
        assert each["uri"] == f"{root}/{found.key}"
        assert (each["etag"], each["size_bytes"], each["last_modified"]) == (
            found.etag,
            found.size_bytes,
            found.last_modified,
        )
        assert (each["extra"], each["version_id"]) == (None, None)


def test_a_unit_that_is_not_in_its_chunk_is_a_conflict(place: Place) -> None:
    place.write({"a": 1})
    (chunk,) = place.plan().chunks
    with pytest.raises(ConflictError, match=f"expected unit nothing, found .*{chunk.unit_ids[0]}"):
        plan.read_unit(place.output, chunk.key, "nothing")


# --- planned once -------------------------------------------------------------------------------------------------


def test_a_planned_range_is_never_planned_again_whatever_the_bucket_looks_like_by_then(place: Place) -> None:
    place.write({"a": 1, "b": 2})
    planned = place.plan()
    before = sorted(storage.list_keys(place.output, ""))
    shutil.rmtree(place.source)
    assert place.plan() == planned
    assert sorted(storage.list_keys(place.output, "")) == before
    assert place.planned_keys(planned) == ["a", "b"]


def test_of_two_planners_one_wins_and_both_give_its_chunks(place: Place) -> None:
    place.write({f"{number:02d}": number for number in range(50)})
    with ThreadPoolExecutor(4) as pool:
        ranges = list(pool.map(lambda _: place.plan(), range(4)))
    assert all(each == ranges[0] for each in ranges)
    assert len(place.planned_keys(ranges[0])) == 50


@pytest.mark.parametrize("data", [b"", b"\xff", b"[1]", b'{"x": 1}'], ids=["cut", "binary", "list", "other fields"])
def test_a_plan_that_somebody_has_damaged_is_a_conflict_that_names_the_file(place: Place, data: bytes) -> None:
    place.write({"a": 1})
    planned, output = place.plan(), place.output
    plan.seal_ranges(output, RUN, lambda: catalog.between([]))
    plan.seal(output, RUN, [planned.summary()])
    (chunk,) = planned.chunks
    folder = f"_runs/{RUN}/plan"
    read: dict[str, Callable[[], object]] = {
        f"{folder}/ranges.json": lambda: plan.seal_ranges(output, RUN, list),
        f"{folder}/range-{planned.range_id}.json": lambda: plan.read_range(output, RUN, planned.range_id),
        f"_runs/{RUN}/plan.json": lambda: plan.read(output, RUN),
        chunk.key: lambda: plan.read_unit(output, chunk.key, chunk.unit_ids[0]),
    }
    for key, again in read.items():
        again()
        output.put(key, data)
        with pytest.raises(ConflictError, match=rf"{key}: expected .*, found .*; restore it"):
            again()


def test_the_first_seal_wins(place: Place) -> None:
    place.write({"a": 1, "b": 2})
    planned = place.plan()
    assert plan.read(place.output, RUN) is None
    sealed = plan.seal(place.output, RUN, [planned.summary()])
    other = dataclasses.replace(planned.summary(), num_units=0, counts={**planned.counts, "planned": 0})
    assert plan.seal(place.output, RUN, [other]) == sealed == plan.read(place.output, RUN)
    assert (sealed.num_units, sealed.encoded_bytes, sealed.counts) == (1, 3, planned.counts)
    assert plan.read_range(place.output, RUN, planned.range_id) == planned


def test_the_counts_of_a_plan_are_the_sums_of_its_ranges(place: Place) -> None:
    place.write({"a": 1, "b": 2})
    planned = place.plan().summary()
    sealed = plan.seal(place.output, RUN, [planned, dataclasses.replace(planned, range_id="0001")])
    assert sealed.counts == {name: 2 * number for name, number in planned.counts.items()}
    assert sealed.num_units == 2


def test_a_preview_writes_nothing(place: Place) -> None:
    place.write({"a": 1})
    assert place.preview().counts["planned"] == 1
    assert not place.output_folder.exists()


# --- what a night records -----------------------------------------------------------------------------------------


def test_a_limit_looks_at_the_first_objects_in_scope_changed_or_not(place: Place) -> None:
    listed = place.write({"a": 1, "b": 1, "c.txt": 1, "d": 1, "e": 1})
    place.remember([row("a", listed["a"].etag, 1), row("a2")])
    planned = place.plan(limit=3, records_deletions=False, scope=Scope(exclude=("*.txt",)))
    assert place.planned_keys(planned) == ["b", "d"]
    assert planned.counts == {
        "listed": 4,
        "filtered": 1,
        "unchanged": 1,
        "planned": 2,
        "known": 1,
        "kept": 1,
        "deleted": 0,
    }
    preview = place.preview(limit=3, records_deletions=False, scope=Scope(exclude=("*.txt",)))
    assert preview.counts == planned.counts


def test_a_run_that_does_not_record_deletions_keeps_what_it_does_not_see(place: Place) -> None:
    place.write({"a": 1})
    place.remember([row("gone")])
    planned = place.plan(records_deletions=False)
    assert (planned.deletions, planned.counts["deleted"]) == ([], 0)


def test_deletions_are_the_catalogs_rows(place: Place) -> None:
    place.write({"b": 1})
    place.remember([row("a", failure_kind="corrupt"), row("c")])
    planned = place.plan()
    (file,) = planned.deletions
    assert place.read(file) == [row("a", failure_kind="corrupt"), row("c")]


def test_an_empty_source_is_a_plan_without_units(place: Place) -> None:
    planned = place.plan()
    assert (planned.chunks, planned.deletions) == ([], [])
    assert Counter(planned.counts).total() == 0


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "another"])
def test_a_damaged_catalog_is_a_conflict_and_named(place: Place, damage: str) -> None:
    place.remember([row(f"{number:05d}") for number in range(20_000)], rows_per_file=20_000)
    path = place.output_folder / place.catalog[0].key
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-100])
    elif damage == "flipped":
        path.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    else:
        path.write_bytes(schema.encode(pa.Table.from_pylist([row("x")], schema.CATALOG)))
    with pytest.raises(ConflictError, match=r"_catalog/0\.parquet: .*restore it"):
        list(catalog.read_rows(place.output, place.catalog))
